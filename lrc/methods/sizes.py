"""The arithmetic between a kept fraction, a size and a parameter count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from lrc.families import Target

Options = Mapping[str, Any]

_ALIGNED, _WIDE = 8, 1024


def even_step(full: int, step: int = 1) -> int:
    """The step between sizes that are chosen for the user, of a target of size ``full`` with legal steps of ``step``.

    Matrix units take rows of 16 bytes, eight half-precision numbers, and run other widths at half the speed or less.
    Eight is under a hundredth of a wide target's size, and a coarse choice of a narrow one's.
    """
    return math.lcm(step, _ALIGNED) if full >= _WIDE else step


class SizeRule(Protocol):
    """How one method measures size; ``word`` is the key a plan uses for it, next to ``keep``."""

    word: str

    def full(self, target: Target, options: Options) -> int:
        """The size at which the method gives the target back."""
        ...

    def nearest(self, target: Target, keep: float, options: Options) -> int:
        """A legal size whose parameter count is about ``keep`` times the target's.

        Of a component it is the nearest, which may keep more; of factors the largest that keeps no more; of wide
        targets a multiple of eight (``even_step``). It is the smallest legal one where that is above.
        """
        ...

    def parameters(self, target: Target, size: int, options: Options) -> int:
        """Weights kept at a size."""
        ...

    def refusal(self, target: Target, size: int, options: Options) -> str | None:
        """Why a size is not legal for a target, naming the nearest that is; None if it is."""
        ...


class ComponentRank:
    """Kept inner dimension of a component: per head for qk and ov, neurons for mlp."""

    word = "rank"

    def full(self, target: Target, options: Options) -> int:
        return target.full

    def nearest(self, target: Target, keep: float, options: Options) -> int:
        step = even_step(target.full, target.step)
        return min(max(round(keep * target.full / step), 1) * step, target.full)

    def parameters(self, target: Target, size: int, options: Options) -> int:
        return size * target.unit

    def refusal(self, target: Target, size: int, options: Options) -> str | None:
        if size < 1:
            return f"rank {size} keeps nothing; the smallest is {target.step}"
        if size > target.full:
            return f"rank {size} is above the full rank; {target.name} has {target.full}"
        if size % target.step:
            near = max(size - size % target.step, target.step)
            legal = f"ranks of {target.name} are multiples of {target.step}, such as {near}"
            return f"rank {size} splits a rotary pair; {legal}"
        return None


class PairRank:
    """Rank of a pair of thin matrices in place of one matrix."""

    word = "rank"

    def full(self, target: Target, options: Options) -> int:
        return target.full

    def nearest(self, target: Target, keep: float, options: Options) -> int:
        rank, step = int(keep * target.parameters / target.unit), even_step(target.full)
        return max(rank - rank % step if rank > step else rank, 1)

    def parameters(self, target: Target, size: int, options: Options) -> int:
        return size * target.unit

    def refusal(self, target: Target, size: int, options: Options) -> str | None:
        largest = target.parameters // target.unit
        if size < 1:
            return f"rank {size} keeps nothing; the smallest is 1"
        if size > target.full:
            return f"rank {size} is above the full rank; {target.name} has {target.full}"
        if size * target.unit > target.parameters:
            return f"a pair of rank {size} is larger than the matrix; the largest that is not is {largest}"
        return None
