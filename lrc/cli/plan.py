"""``lrc plan``: plans for the budgets that are asked for, from what every size costs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from lrc.cli.options import AsJson, Calibration, Inputs, Layers, Model, option, out_option, running
from lrc.cli.screen import result
from lrc.errors import UserError


def _bytes(option: str, size: str) -> int:
    """Return the bytes of ``4G``, ``500 MB``, ``1.5GiB`` or a plain number."""
    from pydantic import ByteSize, TypeAdapter

    # pydantic reads the start of a text and ignores the rest.
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)? *(?:[kMGT]i?)?)B?", size.strip(), re.IGNORECASE)):
        raise UserError(f"{option} {size!r} is not a size; write such as 4G, 500MB, 1.5GiB or 123456789")
    return TypeAdapter(ByteSize).validate_python(f"{found[1]}B")


@dataclass(frozen=True)
class Budget:
    """What to keep, and the plan that the sizes are for."""

    panel: ClassVar = None
    keep: list[float] | None = option(
        "Fraction of the weights of the decoder, and of an embedding or head that the base plan names without a size; "
        "a plan for each."
    )
    size: int | None = option(
        "Of the checkpoint's tensors: 4G is 4e9 bytes, 4GiB 2**32.",
        flag="--bytes",
        metavar="SIZE",
        read=_bytes,
    )
    kv_cache: float | None = option("Fraction of the KV cache; alone it leaves all else whole.")
    base: str | None = option(
        "Methods, options and calibration, in a plan without sizes in the layers.", metavar="PLAN", shown="a3"
    )


@dataclass(frozen=True)
class MeasuringOptions:
    """How to find what sizes cost; fields of ``lrc.Measuring``."""

    panel: ClassVar = "How to find what sizes cost"
    allocate: str | None = option(
        "How to share out the budget: uniform, energy, fisher, importance or sensitivity.",
        metavar="NAME",
        shown="the base plan's, else sensitivity",
    )
    held_out: str | None = option(
        "Text that sensitivity is measured on.",
        metavar="DATA",
        shown="wikitext2:validation; for the built-in models what calibration leaves of builtin:train",
    )
    samples: int | None = option("Its first blocks.", flag="--held-out-samples", least=1, shown="16")
    keeps: list[float] | None = option("Fractions to find the cost at.", shown="0.9,0.75,0.6,0.45,0.3")
    curves: Path | None = option(
        "Curves of what sizes cost: used again where FILE is there, else written to it.",
        metavar="FILE",
        shown="MODEL.ALLOCATION.KEY.curves.json beside the plan, KEY for all that decides the costs",
    )
    fresh: bool = option("Measure again, whatever curves there are.", False)


@dataclass(frozen=True)
class LimitOptions:
    """Which sizes a budget may buy; fields of ``lrc.Limits``."""

    panel: ClassVar = "Which sizes are allowed"
    round_to: int | None = option(
        "Sizes are multiples of N.",
        metavar="N",
        flag="--round",
        shown="8 for targets of 1,024 and wider, else 1",
    )
    floor: float | None = option("Of each target keep at least this.", shown="the smallest fraction measured")
    cap: float = option("Of each target keep at most this; at 1 it may stay whole.", 1.0)


def verb(
    model: Model,
    budget: Budget,
    measuring: MeasuringOptions,
    limits: LimitOptions,
    layers: Layers,
    calibration: Calibration,
    inputs: Inputs,
    out: Annotated[Path, out_option("The plan; NAME-F.yaml for several keeps.")] = Path("plan.yaml"),
    as_json: AsJson = False,
) -> None:
    """Write a plan for MODEL and a budget: find what each size costs, and spend where it saves most."""
    from lrc.allocation.sizing import Limits, Measuring
    from lrc.report.planning import plan_tables
    from lrc.verbs.plan import make_plan

    with running(layers, inputs, as_json=as_json) as run:
        planning = make_plan(
            model,
            **vars(budget),
            calib=calibration.calib,
            measuring=Measuring(**vars(measuring)),
            limits=Limits(**vars(limits)),
            out=out,
            run=run,
        )
    result(planning, plan_tables(planning), as_json)
