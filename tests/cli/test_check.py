"""``lrc check`` without a plan."""

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
    printed = succeeds("check", "out").stdout
    assert printed.startswith("sound: out, ")
    found = json.loads(succeeds("check", "out", "--json").stdout)
    assert (found["folder"], found["sound"], found["damage"]) == ("out", True, [])
    assert f"{found['files']} files, {found['tensors']} tensors" in printed

    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    message = fails("check", "out")
    assert message.startswith("out is damaged\n  model.safetensors: tensor 'model")
    result = run("check", "out", "--json")
    assert result.exit_code == 2
    assert result.stderr == f"error: {message}"
    (damage,) = json.loads(result.stdout)["damage"]
    assert f"tensor {damage['tensor']!r} {damage['problem']}\n" in message


def test_without_a_plan_there_must_be_an_output(fails, tiny_checkpoint):
    for model in (tiny_checkpoint("gpt2"), "tiny-gpt2", "llama-7b", "nowhere"):
        message = fails("check", model)
        assert message.startswith(f"{model} is no folder of an lrc output")
        assert "pass --plan, such as --plan a3-2x" in message
