"""``lrc inspect``: tables, one JSON document, a folder; what it refuses before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lrc.inspection import inspector

Run = Callable[..., object]


@pytest.fixture
def quick(tmp_path: Path) -> list[object]:
    return ["--calib", tmp_path / "text.txt", "--samples", 4, "--device", "cpu"]


def test_by_target_and_layer_by_layer(succeeds, tiny_checkpoint, quick):
    model = tiny_checkpoint("llama")
    printed = succeeds("inspect", model, *quick, "--keeps", "0.5", "--methods", "svd,a3,whitened_svd").stdout
    assert printed.startswith(f"{model}: layers 0-1; moments of ")
    for word in ("Effective", "condition", "Predicted error", "Best method", "whitened_svd", "attn_in"):
        assert word in printed
    assert "layer 1" not in printed
    detail = succeeds(
        "inspect", model, *quick, "--layers", "-1", "--targets", "up,down", "--keeps", "0.5,0.25"
    ).stdout
    assert "1 up" in detail
    assert "0 up" not in detail
    assert "1 down" in detail
    assert "next " in detail


def test_help_speaks_of_no_plan(succeeds):
    assert "plan" not in succeeds("inspect", "--help").stdout


def test_json_is_all_of_stdout(succeeds, tiny_checkpoint, quick):
    found = json.loads(succeeds("inspect", tiny_checkpoint("gpt2"), *quick, "--tables", "--json").stdout)
    assert (found["version"], found["layers"]) == (3, [0, 1])
    assert {t["target"] for t in found["targets"]} >= {"qk", "fc_in", "embed"}


def test_beside_an_output(succeeds, fails, tiny_checkpoint, quick, tmp_path):
    model, other = tiny_checkpoint("llama"), tiny_checkpoint("llama", seed=1)
    plan = ["--plan", tmp_path / "plan.yaml", "--calib", tmp_path / "text.txt", "--device", "cpu"]
    succeeds("compress", model, *plan, "--no-eval", "--out", "out")
    printed = succeeds(
        "inspect", model, *quick, "--against", "out", "--methods", "a3", "--keeps", "0.5"
    ).stdout
    assert "out against the original, as it is stored" in printed
    assert "two_sided_svd" in printed
    told = fails("inspect", other, *quick, "--against", "out")
    assert f"out was made of {model}" in told
    builtin = fails("inspect", "tiny-gpt2", *quick, "--against", "out")
    assert "and tiny-gpt2 has other weights" in builtin  # as it was named, not where it is
    assert f"{other} is no lrc output" in fails("inspect", model, *quick, "--against", other)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layers", "0-9"], "--layers 0-9: there is no layer 9; the model has 2 layers, 0 to 1"),
        (["--layers", "first"], "--layers first: 'first' names no layers; write such as"),
        (["--targets", "gat"], "llama has no target 'gat'; did you mean 'gate'?"),
        (["--targets", "q,fc_in"], "--targets fc_in: llama has no target 'fc_in'"),
        (["--targets", "lm_head"], "the head of this model is tied to its embedding; name embed"),
        (["--methods", "svdd"], "--methods svdd: there is no such method; did you mean 'svd'?"),
        (["--keeps", "0.5,1"], "--keeps 0.5,1: fractions are distinct, above 0 and below 1"),
        (["--keeps", "half"], "--keeps half: 'half' is not a number"),
        (["--seq-len", "4096"], "--seq-len 4096: the model reads 2 to 64 tokens at once; the nearest is 64"),
        (["--samples", "400"], "fewer than the 400 samples asked for"),
        (["--offload", "dsk"], "did you mean 'disk'?"),
        (["--against", "nowhere"], "nowhere is no lrc output: it has no lrc.json"),
        (["--targets", ""], "--targets '' is empty; name something, or leave it out"),
        (["--methods", ","], "--methods ',' is empty"),
        (["--keeps", ""], "--keeps '' is empty"),
        (["-o", "no/such"], "no/such cannot be written: there is no folder"),
        (["-o", "taken"], "taken cannot be written: it is a file; name a folder with -o"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_before_any_layer_is_read(
    argv, message, fails, tiny_checkpoint, quick, work, monkeypatch
):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a layer was looked at")

    monkeypatch.setattr(inspector.Inspector, "run", never)
    (work / "taken").write_text("years of work", encoding="utf-8")
    assert message in fails("inspect", tiny_checkpoint("llama", tie_word_embeddings=True), *quick, *argv)


def test_no_data_and_no_network(fails, tiny_checkpoint):
    message = fails("inspect", tiny_checkpoint("llama"), "--device", "cpu")
    assert "wikitext2" in message
    assert "--data-dir" in message
