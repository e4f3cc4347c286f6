"""``lrc compress MODEL --keep F``: how sizes are found without a plan, and single entries of a plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import lrc
import lrc.estimate.room
from lrc.cli.options import Inputs, Layers
from lrc.run.settings import Run

FEW = ("--set", "calibration={samples: 4, seq_len: 48, gradient_samples: 2}")
TEXT = ("--calib", "builtin:train", "--no-eval", "--device", "cpu")

pytestmark = pytest.mark.usefixtures("without_pages")


@pytest.mark.parametrize("name", ["sensitivity", "fisher"])
def test_sizes_are_measured_where_the_model_fits_else_by_gradients(
    work: Path,
    succeeds: Any,
    tiny_checkpoint: Any,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    model, text = tiny_checkpoint("llama"), (*TEXT, "--data-dir", data_dir)
    with monkeypatch.context() as patch:
        if name == "fisher":
            patch.setattr(lrc.estimate.room, "free_bytes", lambda device: 100_000)
        result = succeeds("compress", model, "--keep", "0.7", *FEW, *text, "--out", "best")
    report = json.loads((work / "best" / "report.json").read_text(encoding="utf-8"))
    assert report["allocation"]["allocation"] == name
    assert report["plan"] == "a3-0.7"
    (note,) = [warning for warning in report["warnings"] if "no plan is given" in warning]
    for told in ("a3", f"allocate {name}", "--set allocate=uniform"):
        assert told in note
    assert note in result.stderr.replace("\n", " ")
    # The same by a plan that says so, of the text that the report shows.
    (work / "plan.yaml").write_text(report["plan_text"], encoding="utf-8")
    succeeds("compress", model, "--plan", "plan.yaml", *text, "--out", "same")
    weights = [(work / out / "model.safetensors").read_bytes() for out in ("best", "same")]
    assert weights[0] == weights[1]


def test_uniform_sizes_take_no_measurement(work: Path, succeeds: Any, tiny_checkpoint: Any) -> None:
    model = tiny_checkpoint("gpt2")
    result = succeeds("compress", model, "--keep", "0.7", "--set", "allocate=uniform", *FEW, *TEXT, "--json")
    report = json.loads(result.stdout)
    assert report["allocation"] is None
    assert not any("no plan is given" in warning for warning in report["warnings"])
    assert Path(report["out"]).name == f"{model.name}-a3-0.7"
    assert report["keep"] == pytest.approx(0.7, abs=0.05)


def test_keep_and_set_change_a_plan(work: Path, succeeds: Any, tiny_checkpoint: Any) -> None:
    model = tiny_checkpoint("llama")
    changed = ("--keep", "0.6", "--set", "method=svd", "--set", "refit=none", *FEW)
    found = json.loads(succeeds("compress", model, "--plan", "a3-2x", *changed, *TEXT, "--json").stdout)
    made = lrc.compress(
        model,
        lrc.Plan(
            keep=0.6,
            method="svd",
            refit="none",
            calibration={"samples": 4, "seq_len": 48, "gradient_samples": 2},  # type: ignore[arg-type]
        ),
        calib="builtin:train",
        ppl=[],
        out="made",
        run=Run(device="cpu"),
    )
    assert found["keep"] == made.keep
    weights = [(Path(out) / "model.safetensors").read_bytes() for out in (found["out"], made.out)]
    assert weights[0] == weights[1]
    assert "# changed by --set method=svd" in found["plan_text"]
    assert "a3-2x" in found["plan"]


def test_a_plan_in_one_string(work: Path, succeeds: Any, tiny_checkpoint: Any) -> None:
    model = tiny_checkpoint("gpt2")
    plan = "{keep: 0.6, method: whitened_svd, calibration: {samples: 2, seq_len: 48}}"
    report = json.loads(succeeds("compress", model, "--plan", plan, *TEXT, "--json").stdout)
    assert report["plan_text"] == plan
    assert Path(report["out"]).name == f"{model.name}-whitened_svd-0.6"


def test_check_without_a_plan_is_what_compress_would_do(succeeds: Any, tiny_checkpoint: Any) -> None:
    found = json.loads(succeeds("check", tiny_checkpoint("llama"), "--keep", "0.7", "--json").stdout)
    assert found["plan"] == "a3-0.7"
    assert any("allocate sensitivity" in warning for warning in found["warnings"])


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ([], "--keep 0.8, or name a plan, such as --plan a3-2x"),
        (["--keep", "1"], "nothing to share out; write a keep below 1"),
        (["--keep", "1.5"], "--keep 1.5: keep: 1.5 is outside (0, 1]"),
        (["--keep", "0.5", "--set", "allocate"], "--set allocate: write KEY=VALUE"),
        (
            ["--keep", "0.5", "--set", "allocate=unifrom"],
            "--set allocate=unifrom: allocate: 'unifrom' is not known",
        ),
        (["--keep", "0.5", "--set", "allocate="], "--set allocate=: has no value"),
        (["--plan", "{keep: 3}"], "--plan:1: keep: 3 is outside (0, 1]"),
        (["--plan", "a3-2x", "--set", "calibration.sample=3"], "unknown key; did you mean 'samples'?"),
    ],
)
def test_mistakes(fails: Callable[..., str], argv: list[str], told: str) -> None:
    assert told in fails("compress", "tiny-gpt2", *argv, "--no-eval")


def test_the_options_are_the_fields_of_a_run() -> None:
    options = {field.name for group in (Inputs, Layers) for field in fields(group)}
    assert options | {"progress", "warn", "processes"} == set(Run.__dataclass_fields__)
