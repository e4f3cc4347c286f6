"""``lrc compare`` and ``--beside`` on real outputs: figures as their reports have them, one page, clear refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from lrc.records.compression import read_report

Run = Callable[..., Result]


@pytest.fixture
def outputs(succeeds: Run, tiny_checkpoint: Callable[..., Path], work: Path, tmp_path: Path) -> list[str]:
    """Two outputs of one checkpoint, evaluated on the text, in the work folder."""
    model = tiny_checkpoint("llama")
    for name, keep in (("out-half", 0.5), ("out-third", 0.34)):
        plan = tmp_path / f"{name}.yaml"
        plan.write_text(
            f"format: 1\nkeep: {keep}\nmethod: svd\ncalibration: {{samples: 4}}\n", encoding="utf-8"
        )
        argv = ["compress", model, "--plan", plan, "-o", name, "--calib", tmp_path / "text.txt"]
        beside = ["--beside", "out-half"] if name == "out-third" else []
        succeeds(*argv, "--ppl", tmp_path / "text.txt", "--device", "cpu", *beside)
    return ["out-half", "out-third"]


def test_outputs_stand_beside_each_other(succeeds: Run, outputs: list[str], work: Path) -> None:
    reports = [read_report(work / name) for name in outputs]
    shown = succeeds("compare", *outputs, "-o", "compare.html")
    for name, report in zip(outputs, reports, strict=True):
        assert name in shown.stdout
        assert f"{report.perplexity[0].after.value:.4g}" in shown.stdout
        assert f"{report.after.bytes / report.before.bytes:.3f}" in shown.stdout
    assert shown.stderr == "wrote compare.html\n"
    (figure,) = reports[0].perplexity
    windows = f"perplexity, {figure.after.windows} windows of {figure.after.seq_len} tokens"
    for told in (windows, "KV per"):
        assert told in shown.stdout
    page = (work / "compare.html").read_text(encoding="utf-8")
    assert {"dense", "half", "third"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", page))

    (source,) = json.loads(succeeds("compare", *outputs, "--json").stdout)["sources"]
    assert source["fingerprint"] == reports[0].fingerprint == reports[1].fingerprint
    assert [output["folder"] for output in source["outputs"]] == outputs
    for output, report in zip(source["outputs"], reports, strict=True):
        (figure,) = output["perplexity"].values()
        assert figure["after"] == report.perplexity[0].after.value
        assert output["after"]["bytes"] == report.after.bytes

    page = (work / "out-third" / "report.html").read_text(encoding="utf-8")
    assert {"dense", "half", "third"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", page))


def test_what_cannot_be_compared_is_refused(
    fails: Callable[..., str], outputs: list[str], work: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    model = tiny_checkpoint("gpt2")
    message = fails("compare", outputs[0], model, "nowhere", "-o", "compare.html")
    assert f"no report.json in {model}, nowhere" in message
    assert "-o nowhere/compare.html cannot be written" in fails(
        "compare", *outputs, "-o", "nowhere/compare.html"
    )
    assert "cannot be written" in fails("compare", *outputs, "-o", ".")
    argv = ["compress", model, "--plan", "svd-2x", "--no-eval", "--device", "cpu", "--out", "new"]
    assert f"not made from {model} as it is now" in fails(*argv, "--beside", outputs[0])
    message = fails(*argv, "--beside", model)
    assert f"--beside: no report.json in {model}; " in message
    assert "name the folder of one, or leave it out" in message
    assert "lrc eval" not in message
    (work / outputs[0] / "report.json").write_text("{", encoding="utf-8")
    assert "out-half/report.json is damaged, it is not JSON" in fails("compare", *outputs)
