"""``lrc compress``: compress a checkpoint by a plan, and write a report."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from lrc.cli.options import AsJson, Calibration, Inputs, Layers, Model, PlanOptions, Texts, option, running
from lrc.cli.screen import result
from lrc.errors import UserError

if TYPE_CHECKING:
    from lrc.records.compression import Report


@dataclass(frozen=True)
class Output:
    """The folder of the output, and what it may replace."""

    panel: ClassVar = "The output"
    out: Path | None = option("Output folder.", flag="-o --out", shown="./MODEL-PLAN", first=True)
    fresh: bool = option(
        "Start an unfinished run again from its beginning, or resume it.", False, flag="--fresh/--resume"
    )
    force: bool = option("Replace the output folder even if lrc did not write it.", False)
    beside: list[Path] | None = option(
        "Another output of MODEL to show in the report; may be repeated.", metavar="DIR"
    )


@dataclass(frozen=True)
class Measured(Texts):
    """Perplexity before and after."""

    no_eval: bool = option("Do not evaluate the output.", False)


def verb(
    model: Model,
    plan: PlanOptions,
    output: Output,
    measured: Measured,
    layers: Layers,
    calibration: Calibration,
    inputs: Inputs,
    as_json: AsJson = False,
) -> None:
    """Compress MODEL to a fraction of its weights, or by a plan, and report size and perplexity before and after."""
    from lrc.report.tables import compression_tables
    from lrc.verbs.compress import compress

    if measured.no_eval and measured.ppl is not None:
        raise UserError("--ppl and --no-eval contradict each other; give one of the two")
    with running(layers, inputs, as_json=as_json) as run:
        report = compress(
            model,
            **vars(plan),
            **vars(output),
            calib=calibration.calib,
            ppl=[] if measured.no_eval else measured.ppl,
            max_windows=measured.max_windows,
            run=run,
        )
    result(report, chain(compression_tables(report), next_steps(report)), as_json)


def next_steps(report: Report) -> Iterator[str]:
    """Yield the commands that come next: evaluate the output, load it in Python, measure its speed."""
    out, model = shlex.quote(report.out), shlex.quote(report.model)
    named = ",".join(change.before.data for change in report.perplexity)
    yield "next:"
    yield f"  lrc eval {out} --against {model}{f' --ppl {shlex.quote(named)}' if named else ''}"
    yield f"  lrc bench {out} --against {model}"
    yield "or in Python:"
    yield "  import lrc, transformers"
    yield f"  model = transformers.AutoModelForCausalLM.from_pretrained({report.out!r})"
