"""``lrc eval --against``: both models by the same measure, and mistakes told before any is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Run = Callable[..., Result]
Fails = Callable[..., str]
TinyCheckpoint = Callable[..., Path]


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets no evaluation begin."""

    def measure(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is measured")

    monkeypatch.setattr("lrc.api.evaluate", measure)


def swap_tokens(folder: Path) -> None:
    """Make a tokenizer read a text as other ids: two bytes' ids change places."""
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    vocab = found["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(found), encoding="utf-8")


@pytest.mark.usefixtures("unmeasured")
def test_an_unknown_second_model_is_told_first(fails: Fails) -> None:
    message = fails("eval", "tiny-gpt2", "--against", "tiny-lama", "--ppl", "builtin")
    assert "unknown model 'tiny-lama'" in message


@pytest.mark.usefixtures("unmeasured")
def test_a_window_beyond_either_model_is_told_first(
    fails: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    short = tiny_checkpoint("llama", max_position_embeddings=32)
    argv = ["eval", tiny_checkpoint("llama"), "--against", short, "--ppl", tmp_path / "text.txt"]
    assert "seq_len 48 is longer than the model's 32 positions" in fails(*argv, "--seq-len", 48)


@pytest.mark.usefixtures("unmeasured")
def test_a_second_model_without_a_usable_config_is_told_first(
    fails: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    broken = tiny_checkpoint("gpt2")
    (broken / "config.json").write_text('{"model_type": "nothing"}')
    message = fails("eval", tiny_checkpoint("gpt2"), "--against", broken, "--ppl", tmp_path / "text.txt")
    assert f"{broken / 'config.json'} cannot be used" in message


@pytest.mark.parametrize(("options", "seq_len"), [([], 32), (["--seq-len", 16], 16)])
def test_both_models_have_the_window_of_the_shorter_one(
    succeeds: Run, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, options: list[object], seq_len: int
) -> None:
    longer, short = tiny_checkpoint("llama"), tiny_checkpoint("gpt2", n_positions=32)
    argv = ["eval", longer, "--against", short, "--ppl", tmp_path / "text.txt", "--device", "cpu", *options]
    found = json.loads(succeeds(*argv, "--json").stdout)
    (ours,), (theirs,) = found["perplexity"], found["against"]["perplexity"]
    assert (ours["seq_len"], theirs["seq_len"]) == (seq_len, seq_len)
    assert ours["windows"] == theirs["windows"]
    assert found["ratio"] == [pytest.approx(ours["value"] / theirs["value"])]
    assert found["ratio_of"] == ["perplexity"]
    assert found["notes"] == []


def test_other_tokens_are_compared_in_bits_per_byte(
    succeeds: Run, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    mine, other = tiny_checkpoint("llama"), tiny_checkpoint("llama", seed=1)
    swap_tokens(other)
    argv = ["eval", mine, "--against", other, "--ppl", tmp_path / "text.txt", "--device", "cpu"]
    found = json.loads(succeeds(*argv, "--json").stdout)
    (ours,), (theirs,) = found["perplexity"], found["against"]["perplexity"]
    assert found["ratio"] == [pytest.approx(ours["bits_per_byte"] / theirs["bits_per_byte"])]
    assert found["ratio"][0] != pytest.approx(ours["value"] / theirs["value"], rel=1e-3)
    assert found["ratio_of"] == ["bits_per_byte"]
    (note,) = found["notes"]
    assert "the tokenizers differ" in note
    printed = " ".join(succeeds(*argv).stdout.split())
    assert f"{found['ratio'][0]:.4f}" in printed
    assert "ratio is of bits per byte" in printed
