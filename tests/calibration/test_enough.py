"""Too few tokens for what is taken of them: widths by hand, and the same words from every verb, early and late."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lrc
from lrc.calibration.draw import too_few
from lrc.cli import app
from lrc.plan.job import Job, make_job, open_checkpoint
from lrc.plan.library import read_draft
from lrc.run.settings import Run
from lrc.verbs.check import check

TinyCheckpoint = Callable[..., Path]
MOMENTS = "calibration has {} tokens for moments of {} dimensions; use more samples"
GRADIENTS = "gradients are of {} tokens for moments of {} dimensions; use more {}"


def prepare(model: str | Path, plan: str | Path) -> Job:
    """A model and a plan resolved for it."""
    return make_job(*open_checkpoint(model, Run()), read_draft(plan))


@pytest.mark.parametrize(
    ("body", "samples", "expected"),
    [
        # 2 blocks of 8 tokens against an MLP of 48, 1 of them for gradients against outputs of 32
        ("keep: 0.5", 2, [MOMENTS.format(16, 48), GRADIENTS.format(8, 32, "gradient_samples")]),
        ("keep: 0.5", 6, [GRADIENTS.format(8, 32, "gradient_samples")]),
        ("keep: 0.5", 1, [MOMENTS.format(8, 48), GRADIENTS.format(8, 32, "samples")]),
        ("keep: 0.5\nmethod: whitened_svd", 6, []),
        ("keep: 0.5\nmethod: whitened_svd", 5, [MOMENTS.format(40, 48)]),
        (
            "method: two_sided_svd\nprojections: {up: {rank: 3}}",
            4,
            [GRADIENTS.format(8, 48, "gradient_samples")],
        ),
        ("projections: {embed: {method: whitened_svd, rank: 3}}", 3, [MOMENTS.format(24, 32)]),
        ("keep: 0.5\nmethod: svd\nallocate: fisher", 6, [GRADIENTS.format(8, 48, "gradient_samples")]),
    ],
)
def test_tokens_are_held_against_widths(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, body: str, samples: int, expected: list[str]
) -> None:
    plan = tmp_path / "plan.yaml"
    settings = f"{{samples: {samples}, gradient_samples: 1, seq_len: 8}}"
    plan.write_text(f"format: 1\n{body}\ncalibration: {settings}\n", encoding="utf-8")
    model = tiny_checkpoint("llama")
    job = prepare(model, plan)
    losses = "fisher" in body
    assert too_few(job.reader.architecture, job.plan, samples, losses=losses) == expected
    assert [warning for warning in check(model, plan).warnings if "dimensions" in warning] == expected


def test_every_verb_says_it_before_the_work_and_keeps_it(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_checkpoint("llama")
    Path("text.txt").write_text("All that is solid melts into air. " * 30, encoding="utf-8")
    settings = "calibration: {samples: 2, gradient_samples: 1, seq_len: 8}\n"
    Path("plan.yaml").write_text(f"format: 1\nkeep: 0.5\n{settings}", encoding="utf-8")
    Path("base.yaml").write_text(f"format: 1\n{settings}", encoding="utf-8")
    expected = [MOMENTS.format(16, 48), GRADIENTS.format(8, 32, "gradient_samples")]

    told: list[str] = []
    run = lrc.Run(device="cpu", warn=told.append)
    lrc.compress(model, "plan.yaml", out="out", ppl=[], calib="text.txt", run=run)
    assert told == expected
    for name in ("report.json", "lrc.json"):
        assert json.loads((tmp_path / "out" / name).read_text(encoding="utf-8"))["warnings"] == expected
    for name in ("report.md", "README.md"):
        page = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert all(f"- Warning: {warning}\n" in page for warning in expected)

    told.clear()
    steps: list[int] = []

    def progress(label: str, total: int) -> Callable[[int], None]:
        assert told == expected
        return steps.append

    planning = lrc.make_plan(
        model,
        keep=0.7,
        base="base.yaml",
        measuring=lrc.Measuring(allocate="energy"),
        run=replace(run, progress=progress),
        out="made.yaml",
        calib="text.txt",
    )
    assert sorted(told) == sorted(planning.warnings)
    assert told[:2] == expected
    assert steps

    argv = ["compress", str(model), "--plan", "plan.yaml", "--calib", "text.txt", "--no-eval", "--fresh"]
    result = CliRunner().invoke(app, [*argv, "--device", "cpu"])
    assert [result.output.count(warning) for warning in expected] == [1, 1]
    assert all(f"warning: {warning}\n" in result.stderr for warning in expected)
    assert CliRunner().invoke(app, [*argv, "--device", "cpu", "--json"]).stderr == ""
