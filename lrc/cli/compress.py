"""``lrc compress``: a checkpoint and a plan to a smaller checkpoint and a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lrc.cli.options import (
    AllowPickle,
    AsJson,
    Calibration,
    DataDir,
    Device,
    Dtype,
    MaxWindows,
    Model,
    PlanName,
    RemoteCode,
    Revision,
    States,
    Texts,
    names,
)
from lrc.cli.processes import processes
from lrc.cli.screen import progress, quiet, show, warn
from lrc.errors import UserError


def compress_model(
    model: Model,
    plan: PlanName,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="Output folder.", show_default="./MODEL-PLAN"),
    ] = None,
    calib: Calibration = None,
    ppl: Texts = None,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not measure perplexity.")] = False,
    data_dir: DataDir = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Calibration blocks at once.", show_default="by their length")
    ] = None,
    states: States = None,
    max_windows: MaxWindows = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on with an unfinished run, or start it over.")
    ] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an output folder that is not an lrc output.")
    ] = False,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR", help="An earlier output of MODEL to show in report.html; may be repeated."
        ),
    ] = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Compress MODEL by a plan into a new checkpoint, and report what it cost."""
    quiet()
    from lrc.report.tables import summary
    from lrc.verbs.compress import compress

    with processes() as ranks:
        if no_eval and ppl is not None:
            raise UserError("--ppl and --no-eval contradict each other; give one of the two")
        with progress(ranks.first) as track:
            report = compress(
                model,
                plan,
                out=out,
                calib=calib,
                ppl=[] if no_eval else names("--ppl", ppl),
                data_dir=data_dir,
                device=device,
                dtype=dtype,
                batch_size=batch_size,
                states=states,
                max_windows=max_windows,
                fresh=not resume,
                force=force,
                beside=beside or (),
                revision=revision,
                allow_pickle=allow_pickle,
                trust_remote_code=trust_remote_code,
                progress=track,
                warn=None if as_json or not ranks.first else warn,
                ranks=ranks,
            )
        if not ranks.first:
            return
        if as_json:
            sys.stdout.write(report.to_json())
        else:
            show(*summary(report))
