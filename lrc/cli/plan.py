"""``lrc plan``: what every size costs, found once, to plans for the budgets that are asked for."""

from __future__ import annotations

import re
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
    Model,
    RemoteCode,
    Revision,
    States,
    fractions,
)
from lrc.cli.processes import processes
from lrc.cli.screen import progress, quiet, show, show_json, warn
from lrc.errors import UserError

_SIZE = re.compile(r"(\d+(?:\.\d*)?)\s*(?:([kMGT])(i?)B?|B)?", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def plan_model(
    model: Model,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="F[,F...]",
            help="Fraction of the weights of the decoder, and of an embedding or head that the base plan names "
            "without a size; a plan for each.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--bytes", metavar="SIZE", help="Of the checkpoint's tensors: 4G is 4e9 bytes, 4GiB 2**32."
        ),
    ] = None,
    kv_cache: Annotated[
        float | None,
        typer.Option(metavar="F", help="Fraction of the KV cache; alone it leaves all else whole."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN",
            help="Methods, options and calibration, in a plan without sizes in the layers.",
            show_default="a3",
        ),
    ] = None,
    allocate: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How to share out the budget: uniform, energy, fisher, importance or sensitivity.",
            show_default="the base plan's, else sensitivity",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Text that sensitivity is measured on.",
            show_default="wikitext2:validation; builtin:train for the built-in models, but for what calibration draws "
            "of it",
        ),
    ] = None,
    held_out_samples: Annotated[
        int | None, typer.Option(min=1, help="Blocks of it, from the start.", show_default="8")
    ] = None,
    keeps: Annotated[
        str | None,
        typer.Option(
            metavar="F[,F...]",
            help="Fractions of each target at which to find its cost.",
            show_default="0.9,0.75,0.6,0.45,0.3",
        ),
    ] = None,
    calib: Calibration = None,
    data_dir: DataDir = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Blocks at once.", show_default="by their length")
    ] = None,
    states: States = None,
    curves: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Curves of what sizes cost: used again where FILE is there, else written to it.",
            show_default="MODEL.ALLOCATION.KEY.curves.json beside the plan, KEY for all that they hang on",
        ),
    ] = None,
    round_to: Annotated[
        int | None,
        typer.Option(
            "--round",
            metavar="N",
            help="Sizes are multiples of N.",
            show_default="8 for targets of 1,024 and wider, else 1",
        ),
    ] = None,
    floor: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="Of each target keep at least this.",
            show_default="the smallest fraction measured",
        ),
    ] = None,
    cap: Annotated[
        float, typer.Option(metavar="F", help="Of each target keep at most this; at 1 it may stay whole.")
    ] = 1.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew, whatever curves there are.")] = False,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="The plan; NAME-F.yaml for several keeps.")
    ] = Path("plan.yaml"),
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a plan for MODEL and a budget: find what each size costs, and spend where it saves most."""
    quiet()
    from lrc.report.planning import pictures
    from lrc.verbs.plan import make_plan

    with processes() as ranks:
        kept, measured = (
            None if listed is None else fractions(option, listed)
            for option, listed in (("--keep", keep), ("--keeps", keeps))
        )
        with progress(ranks.first) as track:
            planning = make_plan(
                model,
                keep=kept,
                size=None if size is None else _bytes(size),
                kv_cache=kv_cache,
                base=base,
                allocate=allocate,
                held_out=held_out,
                held_out_samples=held_out_samples,
                keeps=measured,
                calib=calib,
                data_dir=data_dir,
                device=device,
                dtype=dtype,
                batch_size=batch_size,
                states=states,
                curves=curves,
                round_to=round_to,
                floor=floor,
                cap=cap,
                fresh=fresh,
                out=out,
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
            show_json(planning)
        else:
            show(*pictures(planning))


def _bytes(size: str) -> int:
    """``4G``, ``500 MB``, ``1.5GiB`` or plain bytes."""
    if not (match := _SIZE.fullmatch(size.strip())):
        raise UserError(f"--bytes {size!r} is not a size; write such as 4G, 500MB, 1.5GiB or 123456789")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS.get((unit or "").lower(), 0))
