"""The result of ``lrc check``."""

from __future__ import annotations

from dataclasses import dataclass

from lrc.checkpoint.sizes import Size
from lrc.estimate.memory import Memory
from lrc.estimate.sizes import TargetSize
from lrc.plan.resolved import Share


@dataclass(frozen=True)
class Check:
    """Sizes and memory of a plan for a model. ``memory`` and ``least_memory`` are estimates, all else is exact.

    ``keep``: kept fraction of the decoder's weights. ``with_tables``: with the tables that the plan names, if any.
    ``memory``: with hidden states on the GPU; ``least_memory``: off it.
    """

    model: str
    plan: str
    keep: float
    with_tables: Share | None
    before: Size
    after: Size
    targets: list[TargetSize]
    memory: Memory
    least_memory: Memory
    warnings: list[str]
