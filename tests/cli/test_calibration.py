"""Calibration on mixtures and on text of the model's own, through the verbs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

import lrc.calibration.synthetic
from lrc.compression.loop import Compressor
from lrc.text.blocks import ids_sha256

pytestmark = pytest.mark.usefixtures("without_pages")

Run = Callable[..., Result]
Fails = Callable[..., str]
TinyCheckpoint = Callable[..., Path]

PLAN = "format: 1\nkeep: 0.5\ncalibration: {data: %s, samples: 6, seq_len: 16}\n"


@pytest.fixture
def mixed(work: Path) -> None:
    """Two texts of 40 sentences in the work folder, and plans that name them."""
    for name, word in (("a.txt", "sheep"), ("b.txt", "goats")):
        lines = [f"{n * 7919 % 9973} {word} went by." for n in range(40)]
        (work / name).write_text(" ".join(lines), encoding="utf-8")
    for name, data in (
        ("half", "{a.txt: 2, b.txt: 1}"),
        ("own", "synthetic"),
        ("both", "[a.txt, synthetic]"),
    ):
        (work / f"{name}.yaml").write_text(PLAN % data, encoding="utf-8")


@pytest.fixture
def model(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The blocks of every compression that ran."""
    blocks, run = [], Compressor.run

    def keep(self: Compressor, given: torch.Tensor, *rest: Any) -> Any:
        blocks.append(given)
        return run(self, given, *rest)

    monkeypatch.setattr(Compressor, "run", keep)
    return blocks


def compress(succeeds: Run, model: Path, plan: str, out: str, *options: object) -> dict[str, Any]:
    argv = ["compress", model, "--plan", f"{plan}.yaml", "--out", out, "--no-eval", "--device", "cpu"]
    succeeds(*argv, *options)
    return json.loads((Path(out) / "lrc.json").read_text(encoding="utf-8"))["calibration"]


@pytest.mark.usefixtures("mixed")
def test_a_mixture_by_plan_and_by_option_is_the_same(
    succeeds: Run, model: Path, work: Path, ran: list[torch.Tensor]
) -> None:
    record = compress(succeeds, model, "half", "out")
    assert [(s["data"], s["weight"], s["blocks"]) for s in record["sources"]] == [
        ("a.txt", 2, 4),
        ("b.txt", 1, 2),
    ]
    assert record["ids_sha256"] == ids_sha256(ran[0])
    assert (
        compress(succeeds, model, "own", "other", "--calib", "a.txt=4,b.txt=2")["ids_sha256"]
        == record["ids_sha256"]
    )
    assert compress(succeeds, model, "half", "third", "--calib", "b.txt")["sources"][0]["blocks"] == 6
    for name in ("README.md", "report.md"):
        page = (work / "out" / name).read_text(encoding="utf-8")
        assert "Calibrated on 6 blocks of 16 tokens: 4 of a.txt, 2 of b.txt." in page


@pytest.mark.usefixtures("mixed")
def test_text_of_the_models_own_is_reproducible_and_recorded(
    succeeds: Run, model: Path, work: Path, ran: list[torch.Tensor]
) -> None:
    record = compress(succeeds, model, "own", "out")
    (source,) = record["sources"]
    assert (source["blocks"], source["start"], source["temperature"]) == (6, 0, 1.0)
    assert source["ids_sha256"] == record["ids_sha256"] == ids_sha256(ran[0])
    assert "text_sha256" not in source
    compress(succeeds, model, "own", "again")
    for name in ("model.safetensors", "lrc.json"):
        assert (work / "out" / name).read_bytes() == (work / "again" / name).read_bytes()
    report = json.loads((work / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["seconds"]["generate"] > 0
    both = compress(succeeds, model, "both", "both")
    assert [(s["data"], s["blocks"]) for s in both["sources"]] == [("a.txt", 3), ("synthetic", 3)]
    assert torch.equal(
        ran[2][1::2], ran[0][:3]
    )  # interleaved behind a.txt, and the first of what it wrote alone


@pytest.mark.usefixtures("mixed")
def test_mistakes_leave_nothing_behind(
    fails: Fails, model: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["compress", model, "--plan", "half.yaml", "--no-eval", "--device", "cpu"]
    assert "b.txt: a weight of 0 " in fails(*argv, "--calib", "a.txt=1,b.txt=0")
    assert "unknown text 'nothing'" in fails(*argv, "--calib", "a.txt=1,nothing=1")
    (work / "all.yaml").write_text(PLAN.replace("6", "all", 1) % "synthetic", encoding="utf-8")
    argv[3] = "all.yaml"
    assert "samples: all is not possible with synthetic text" in fails(*argv)
    assert "samples: all is not possible with synthetic text" in fails("check", model, "--plan", "all.yaml")
    assert "synthetic, which has no splits, is for calibration alone" in fails(
        "eval", model, "--ppl", "synthetic"
    )
    monkeypatch.setattr(lrc.calibration.synthetic, "free_bytes", lambda device: 1000)
    argv[3] = "own.yaml"
    assert "synthetic calibration text is written by the whole model on cpu" in fails(*argv)


@pytest.mark.usefixtures("mixed")
def test_check_says_what_writing_takes(succeeds: Run, model: Path) -> None:
    (warning,) = json.loads(succeeds("check", model, "--plan", "own.yaml", "--json").stdout)["warnings"]
    assert "the whole model writes synthetic text beforehand: about " in warning
    assert json.loads(succeeds("check", model, "--plan", "half.yaml", "--json").stdout)["warnings"] == []


def test_list_names_synthetic_text(succeeds: Run) -> None:
    assert "synthetic" in {
        item["name"] for item in json.loads(succeeds("list", "data", "--json").stdout)["data"]
    }


# lrc plan

QUICK = ("--keep", "0.8", "--held-out-samples", "2", "--keeps", "0.7,0.4", "--device", "cpu", "--json")
BASE = "format: 1\ncalibration: {data: {'builtin:test': 1, synthetic: 1}, samples: 4, seq_len: 48}\n"


def test_plan_takes_mixtures_and_measures_anew_when_they_change(
    work: Path, model: Path, succeeds: Run
) -> None:
    (work / "base.yaml").write_text(BASE, encoding="utf-8")
    (work / "held-out.txt").write_text("Goats went by. " * 20, encoding="utf-8")
    argv = ("plan", model, "--base", "base.yaml", *QUICK, "--held-out", "held-out.txt")
    found = json.loads(succeeds(*argv).stdout)
    assert found["calibration"] == "builtin:test=1,synthetic=1 (4 blocks of 48 tokens)"
    assert found["warnings"][0] == "builtin: test split used for calibration"
    assert (
        "calibration: {data: {'builtin:test': 1, synthetic: 1}, samples: 4, seq_len: 48, gradient_samples: 32, "
        "seed: 0}" in (work / "plan.yaml").read_text(encoding="utf-8")
    )
    assert not json.loads(succeeds(*argv).stdout)["measured"]
    assert json.loads(succeeds(*argv, "--calib", "builtin:test=3,synthetic=1").stdout)["measured"]


def test_held_out_text_is_none_of_any_source(work: Path, model: Path, fails: Fails) -> None:
    text = " ".join(f"{n} sheep and {n * 37 % 101} goats." for n in range(200))
    (work / "text.txt").write_text(text, encoding="utf-8")
    (work / "copy.txt").write_text(f"Once upon a time: {text}", encoding="utf-8")
    (work / "base.yaml").write_text(BASE.replace("samples: 4", "samples: all"), encoding="utf-8")
    argv = ("plan", model, "--base", "base.yaml", *QUICK, "--held-out", "text.txt")
    message = fails(*argv, "--calib", "builtin:test,copy.txt")
    assert "held-out text text.txt: it overlaps the calibration blocks" in message
