"""What a plan gives for a model, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass

from lrc.checkpoint.sizes import Size
from lrc.estimate.memory import Memory
from lrc.estimate.sizes import TargetSize
from lrc.plan.resolved import Share


@dataclass(frozen=True)
class Check:
    """What a plan comes to for a model. ``memory`` and ``least_memory``, with hidden states on the GPU and off it, are
    estimates, all else is exact.

    ``keep``: of the decoder's weights; ``with_tables``: of these and of the tables that the plan names, None where it
    names none.
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
