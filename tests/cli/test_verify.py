"""``lrc verify``: a sound output, a damaged one, and what is no output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., object]


@pytest.fixture
def out(succeeds, tiny_checkpoint, tmp_path: Path, work: Path) -> Path:
    argv = [
        "--plan",
        tmp_path / "plan.yaml",
        "--calib",
        tmp_path / "text.txt",
        "--device",
        "cpu",
        "--no-eval",
    ]
    succeeds("compress", tiny_checkpoint("llama"), *argv, "--out", "out")
    return work / "out"


def test_a_sound_output_and_a_damaged_one(succeeds, run, fails, out):
    printed = succeeds("verify", "out").stdout
    assert printed.startswith("sound: out, ")
    found = json.loads(succeeds("verify", "out", "--json").stdout)
    assert (found["folder"], found["sound"], found["damage"]) == ("out", True, [])
    assert f"{found['files']} files, {found['tensors']} tensors" in printed

    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    message = fails("verify", "out")
    assert message.startswith("out is damaged\n  model.safetensors: tensor 'model")
    result = run("verify", "out", "--json")
    assert result.exit_code == 2
    assert result.stderr == f"error: {message}"
    (damage,) = json.loads(result.stdout)["damage"]
    assert f"tensor {damage['tensor']!r} {damage['problem']}\n" in message


def test_a_folder_that_is_no_output_is_refused(fails, tiny_checkpoint):
    for folder in (tiny_checkpoint("gpt2"), "tiny-gpt2", "nowhere"):
        message = fails("verify", folder)
        assert message.startswith(f"{folder} ")
        assert "lrc.json" in message
