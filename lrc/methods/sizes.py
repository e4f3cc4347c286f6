"""Define sizes: how much of a target a method keeps, in the method's own type, with its weights and bytes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from lrc.errors import as_text_number
from lrc.families import Target

Options = Mapping[str, Any]
Scalar = int | str
# Hashable and JSON values; lists of a plan become tuples.
SizeValue = Scalar | tuple[Scalar | tuple[Scalar, ...], ...]

_ALIGNED, _WIDE = 8, 1024


class SizeRule(ABC):
    """How one method expresses sizes; ``word`` is the key of the size in a plan, the alternative to ``keep``."""

    word: ClassVar[str]

    @abstractmethod
    def read(self, value: object) -> SizeValue:
        """Return the size for a value of a plan's YAML. Raises ValueError for an invalid value."""

    @abstractmethod
    def full(self, target: Target, options: Options) -> SizeValue:
        """Return the size at which the method reproduces the target."""

    @abstractmethod
    def nearest(self, target: Target, keep: float, options: Options) -> SizeValue:
        """Return the largest legal, fast size that keeps no more than the fraction ``keep`` of the target's weights.

        If every legal size keeps more, return the smallest.
        """

    @abstractmethod
    def refusal(self, target: Target, size: SizeValue, options: Options) -> str | None:
        """Return why a size is not legal for a target, with the nearest that is; None if it is legal."""

    @abstractmethod
    def weights(self, target: Target, size: SizeValue, options: Options) -> int:
        """Return the number of weights kept at a size."""

    @abstractmethod
    def choices(self, target: Target, options: Options, multiple: int | None = None) -> list[SizeValue]:
        """Return the legal, fast sizes that save weights, ascending in weights.

        ``multiple``: its multiples instead, if sizes are numbers; 1 gives all legal sizes.
        """

    def bytes(self, target: Target, size: SizeValue, options: Options, each: float) -> int:
        """Return the bytes that the kept weights take if one of the target takes ``each``, without biases."""
        return round(self.weights(target, size, options) * each)

    def inner(self, target: Target, size: SizeValue) -> int:
        """Return the inner dimension at a size: of a component (per head for qk and ov), or between two factors."""
        return target.full


class Rank(SizeRule):
    """Sizes that are whole numbers: the kept inner dimension."""

    word = "rank"

    def read(self, value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise ValueError(as_text_number(value) or f"{value!r} is not a whole number")

    def unit(self, target: Target, options: Options) -> int:
        """Return the number of weights that each rank keeps."""
        return target.unit

    def full(self, target: Target, options: Options) -> int:
        return target.full

    def weights(self, target: Target, size: Any, options: Options) -> int:
        return size * self.unit(target, options)

    def choices(self, target: Target, options: Options, multiple: int | None = None) -> list[SizeValue]:
        full, saving = self.full(target, options), (target.parameters - 1) // self.unit(target, options)
        step = math.lcm(target.step, multiple or fast_step(full))
        return list(range(step, min(full - 1, saving) + 1, step))

    def refusal(self, target: Target, size: Any, options: Options) -> str | None:
        if size < 1:
            return f"rank {size} keeps nothing; the smallest is {target.step}"
        if size > target.full:
            return f"rank {size} is above the full rank; {target.name} has {target.full}"
        return None

    def inner(self, target: Target, size: Any) -> int:
        return size


class ComponentRank(Rank):
    """Kept inner dimension of a component: per head for qk and ov, neurons for mlp."""

    def nearest(self, target: Target, keep: float, options: Options) -> int:
        step = math.lcm(target.step, fast_step(target.full))
        size = most(keep, target.full)
        return min(max(size - size % step, step), target.full)

    def refusal(self, target: Target, size: Any, options: Options) -> str | None:
        reason = super().refusal(target, size, options)
        if reason is None and size % target.step:
            near = size - size % target.step or target.step
            legal = f"ranks of {target.name} are multiples of {target.step}, such as {near}"
            return f"rank {size} splits a rotary pair; {legal}"
        return reason


class PairRank(Rank):
    """Rank of a pair of thin matrices that replaces one matrix."""

    def nearest(self, target: Target, keep: float, options: Options) -> int:
        rank, step = most(keep, target.parameters) // target.unit, fast_step(target.full)
        return max(rank - rank % step if rank > step else rank, 1)

    def refusal(self, target: Target, size: Any, options: Options) -> str | None:
        largest = target.parameters // target.unit
        reason = super().refusal(target, size, options)
        if reason is None and size > largest:
            return f"a pair of rank {size} is larger than the matrix; the largest that is not is {largest}"
        return reason


def most(keep: float, whole: int) -> int:
    """Return the largest part of ``whole`` whose fraction, as a float, is at most ``keep``."""
    part = math.ceil(keep * whole)
    return part if part / whole <= keep else part - 1


def fast_step(full: int) -> int:
    """Return the step between automatically chosen ranks of a target whose full rank is ``full``.

    Matrix units read rows of 16 bytes, eight half-precision numbers; other widths run at half the speed or less.
    Steps of eight are under a hundredth of a wide target's rank, but too coarse for a narrow target.
    """
    return _ALIGNED if full >= _WIDE else 1


def size_text(size: SizeValue) -> str:
    """Return a size as people write it: ``32``, ``4 x 8``."""
    return " x ".join(size_text(each) for each in size) if isinstance(size, tuple) else str(size)
