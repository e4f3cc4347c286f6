"""``lrc plan``: what every size costs, found once, to plans for the budgets that are asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lrc.cli.options import AsJson, Calibration, Layers, Model, Place, Source, fractions, running
from lrc.cli.screen import quiet, show, show_json
from lrc.errors import UserError

_SIZE = re.compile(r"(\d+(?:\.\d*)?)\s*(?:([kMGT])(i?)B?|B)?", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True)
class BudgetOptions:
    """What may be kept."""

    keep: Annotated[
        str | None,
        typer.Option(
            metavar="F[,F...]",
            help="Fraction of the weights of the decoder, and of an embedding or head that the base plan names "
            "without a size; a plan for each.",
        ),
    ] = None
    size: Annotated[
        str | None,
        typer.Option(
            "--bytes", metavar="SIZE", help="Of the checkpoint's tensors: 4G is 4e9 bytes, 4GiB 2**32."
        ),
    ] = None
    kv_cache: Annotated[
        float | None,
        typer.Option(metavar="F", help="Fraction of the KV cache; alone it leaves all else whole."),
    ] = None

    @property
    def fractions(self) -> list[float] | None:
        """Kept fractions, each of which gets a plan."""
        return None if self.keep is None else fractions("--keep", self.keep)

    @property
    def bytes(self) -> int | None:
        """Bytes of the checkpoint's tensors."""
        return None if self.size is None else _bytes(self.size)


@dataclass(frozen=True)
class MeasuringOptions:
    """How to find what sizes cost; fields of ``lrc.Measuring``."""

    allocate: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How to share out the budget: uniform, energy, fisher, importance or sensitivity.",
            show_default="the base plan's, else sensitivity",
        ),
    ] = None
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Text that sensitivity is measured on.",
            show_default="wikitext2:validation; builtin:train for the built-in models, but for what calibration draws "
            "of it",
        ),
    ] = None
    samples: Annotated[
        int | None,
        typer.Option("--held-out-samples", min=1, help="Blocks of it, from the start.", show_default="8"),
    ] = None
    keeps: Annotated[
        str | None,
        typer.Option(
            metavar="F[,F...]",
            help="Fractions of each target at which to find its cost.",
            show_default="0.9,0.75,0.6,0.45,0.3",
        ),
    ] = None
    curves: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Curves of what sizes cost: used again where FILE is there, else written to it.",
            show_default="MODEL.ALLOCATION.KEY.curves.json beside the plan, KEY for all that they hang on",
        ),
    ] = None
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew, whatever curves there are.")] = False


@dataclass(frozen=True)
class LimitOptions:
    """Which sizes a budget may buy; fields of ``lrc.Limits``."""

    round_to: Annotated[
        int | None,
        typer.Option(
            "--round",
            metavar="N",
            help="Sizes are multiples of N.",
            show_default="8 for targets of 1,024 and wider, else 1",
        ),
    ] = None
    floor: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="Of each target keep at least this.",
            show_default="the smallest fraction measured",
        ),
    ] = None
    cap: Annotated[
        float, typer.Option(metavar="F", help="Of each target keep at most this; at 1 it may stay whole.")
    ] = 1.0


def plan_model(
    model: Model,
    *,
    budget: BudgetOptions,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN",
            help="Methods, options and calibration, in a plan without sizes in the layers.",
            show_default="a3",
        ),
    ] = None,
    measuring: MeasuringOptions,
    limits: LimitOptions,
    calib: Calibration = None,
    layers: Layers,
    place: Place,
    source: Source,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="The plan; NAME-F.yaml for several keeps.")
    ] = Path("plan.yaml"),
    as_json: AsJson = False,
) -> None:
    """Write a plan for MODEL and a budget: find what each size costs, and spend where it saves most."""
    quiet()
    from lrc.allocation.sizing import Limits, Measuring
    from lrc.report.planning import pictures
    from lrc.verbs.plan import make_plan

    keeps = None if measuring.keeps is None else fractions("--keeps", measuring.keeps)
    with running(layers, place, source, as_json=as_json) as run:
        planning = make_plan(
            model,
            keep=budget.fractions,
            size=budget.bytes,
            kv_cache=budget.kv_cache,
            base=base,
            calib=calib,
            measuring=Measuring(**{**vars(measuring), "keeps": keeps}),
            limits=Limits(**vars(limits)),
            out=out,
            run=run,
        )
    if not run.processes.first:
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
