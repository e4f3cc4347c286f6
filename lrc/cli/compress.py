"""``lrc compress``: a checkpoint and a plan to a smaller checkpoint and a report."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lrc.cli.options import (
    AsJson,
    Calibration,
    Layers,
    MaxWindows,
    Model,
    Place,
    PlanOptions,
    Source,
    Texts,
    names,
    running,
)
from lrc.cli.screen import quiet, show
from lrc.errors import UserError


@dataclass(frozen=True)
class Output:
    """The folder of the output, and what it may take the place of."""

    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="Output folder.", show_default="./MODEL-PLAN"),
    ] = None
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with an unfinished run, or start it over.")
    ] = True
    force: Annotated[
        bool, typer.Option("--force", help="Replace an output folder that is not an lrc output.")
    ] = False
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR", help="An earlier output of MODEL to show in report.html; may be repeated."
        ),
    ] = None


@dataclass(frozen=True)
class Measured:
    """The perplexity before and after."""

    ppl: Texts = None
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not measure perplexity.")] = False
    max_windows: MaxWindows = None

    @property
    def texts(self) -> list[str] | None:
        """The texts to measure on, none of them or the default. Raises UserError where the options contradict."""
        if self.no_eval and self.ppl is not None:
            raise UserError("--ppl and --no-eval contradict each other; give one of the two")
        return [] if self.no_eval else names("--ppl", self.ppl)


def compress_model(
    model: Model,
    plan: PlanOptions,
    output: Output,
    measured: Measured,
    layers: Layers,
    place: Place,
    source: Source,
    calib: Calibration = None,
    as_json: AsJson = False,
) -> None:
    """Compress MODEL to a fraction of its weights, or by a plan, into a new checkpoint; and report what it cost."""
    quiet()
    from lrc.report.tables import summary
    from lrc.verbs.compress import compress

    with running(layers, place, source, as_json=as_json) as run:
        report = compress(
            model,
            plan.plan,
            keep=plan.keep,
            changes=plan.changes,
            out=output.out,
            calib=calib,
            ppl=measured.texts,
            max_windows=measured.max_windows,
            fresh=not output.resume,
            force=output.force,
            beside=output.beside or (),
            run=run,
        )
    if not run.processes.first:
        return
    if as_json:
        sys.stdout.write(report.to_json())
    else:
        show(*summary(report))
