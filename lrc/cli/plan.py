"""``lrc plan``: write plans for budgets, with the sizes of least cost."""

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
    """What to keep, and the base plan."""

    panel: ClassVar = None
    keep: list[float] | None = option(
        "Fraction of the decoder's weights to keep; several fractions give a plan each. An embedding or head that "
        "the base plan names without a size counts with the decoder."
    )
    bytes: int | None = option(
        "Size of all tensors of the checkpoint. 4G is 4e9 bytes, 4GiB is 2**32 bytes.",
        metavar="SIZE",
        read=_bytes,
    )
    kv_cache: float | None = option("Fraction of the KV cache to keep. Without --keep only qk and ov shrink.")
    base: str | None = option(
        "Plan with the methods, options and calibration to use. It sets no sizes in the layers.",
        metavar="PLAN",
        shown="method a3",
    )


@dataclass(frozen=True)
class MeasuringOptions:
    """How the cost of sizes is found; fields of ``lrc.Measuring``."""

    panel: ClassVar = "How the cost of sizes is found"
    allocate: str | None = option(
        "How to find the cost of sizes: uniform, energy, fisher, importance or sensitivity.",
        metavar="NAME",
        shown="the base plan's, else sensitivity",
    )
    held_out: str | None = option(
        "Held-out texts on which sensitivity measures the damage.",
        metavar="DATA[=W],...",
        shown="the validation splits of general where calibration is on general, else wikitext2:validation; for the "
        "built-in models the part of builtin:train that calibration does not use",
    )
    held_out_samples: int | None = option("Blocks of the held-out texts to read.", least=1, shown="16")
    keeps: list[float] | None = option(
        "Kept fractions at which the cost is measured.", shown="seven from 0.95 to 0.2"
    )
    curves: Path | None = option(
        "File that caches the cost of sizes. It is read if it exists, else written.",
        metavar="FILE",
        shown="MODEL.ALLOCATION.KEY.curves.json beside the plan; KEY is a hash of the settings",
    )
    fresh: bool = option("Ignore cached costs and measure again.", False)


@dataclass(frozen=True)
class LimitOptions:
    """Which sizes a budget may buy; fields of ``lrc.Limits``."""

    panel: ClassVar = "Which sizes are allowed"
    round_to: int | None = option(
        "Choose only sizes that are multiples of N.",
        metavar="N",
        flag="--round",
        shown="8 for targets of 1,024 and wider, else 1",
    )
    floor: float | None = option("Smallest fraction of a target to keep.", shown="the smallest of --keeps")
    cap: float = option("Largest fraction of a target to keep. At 1 a target may stay whole.", 1.0)


def verb(
    model: Model,
    budget: Budget,
    measuring: MeasuringOptions,
    limits: LimitOptions,
    layers: Layers,
    calibration: Calibration,
    inputs: Inputs,
    out: Annotated[Path, out_option("File of the plan. Several fractions give NAME-F.yaml each.")] = Path(
        "plan.yaml"
    ),
    as_json: AsJson = False,
) -> None:
    """Write a plan for MODEL and a budget: find the cost of each size, and choose the sizes of least cost."""
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
