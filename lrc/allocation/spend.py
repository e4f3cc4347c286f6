"""Spends a budget of weights where it saves most: from what shrinking each target alone costs, to its size."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Curve:
    """What shrinking one target costs, all else whole, in a unit that all curves of an allocation share.

    ``layer`` is None for the embedding and the head, which are outside the layers.

    ``costs`` are at ``sizes``, which ascend and leave out the ``full`` one, where the cost is 0. A size keeps ``unit``
    weights for each of it; the full one is the target left as it is, ``whole`` weights, of which factors would take
    more. Legal sizes are the multiples of ``step`` from ``floor`` and the smallest of ``sizes`` to ``cap``, and the
    full one where ``cap`` is None.
    """

    layer: int | None
    target: str
    sizes: tuple[int, ...]
    costs: tuple[float, ...]
    full: int
    unit: int
    whole: int
    step: int = 1
    floor: int = 0
    cap: int | None = None

    @property
    def name(self) -> str:
        """The target and where it is."""
        return self.target if self.layer is None else f"{self.target} of layer {self.layer}"

    @property
    def legal(self) -> list[int]:
        """Every legal size, ascending."""
        first = -(-max(self.sizes[0], self.floor) // self.step) * self.step
        # A pair may be larger than its matrix long before full rank.
        last = min(self.full - 1, (self.whole - 1) // self.unit)
        if self.cap is None:
            return [*range(first, last + 1, self.step), self.full]
        return [*range(first, min(last, self.cap) + 1, self.step)]

    @property
    def smallest(self) -> int:
        """Weights kept at the smallest legal size."""
        return self.kept(self.legal[0])

    @property
    def largest(self) -> int:
        """Weights kept at the largest legal size."""
        return self.kept(self.legal[-1])

    def kept(self, size: int) -> int:
        """Weights that a size keeps."""
        return self.whole if size == self.full else size * self.unit


@dataclass(frozen=True)
class Allocation:
    """Sizes in the order of the curves, the weights they keep and what the curves add up to."""

    sizes: tuple[int, ...]
    weights: int
    cost: float


def allocate(curves: Sequence[Curve], budget: int) -> Allocation:
    """The sizes of least cost that keep at most ``budget`` of the curves' weights; costs are taken to add up.

    One price per weight decides every size (a Lagrange multiplier, found by bisection); what that leaves of the budget
    goes, step by step, where a weight saves most. ``budget`` is at least the sum of the curves' ``smallest``.
    """
    least = sum(curve.smallest for curve in curves)
    assert budget >= least, f"a budget of {budget} weights is below the smallest sizes, which keep {least}"
    choices = [_Choices(curve) for curve in curves]
    low, high = 0.0, 1e-12
    while _spent(choices, high) > budget:
        low, high = high, 2 * high
    for _ in range(60):
        price = (low + high) / 2
        low, high = (price, high) if _spent(choices, price) > budget else (low, price)
    chosen = [choice.best(high) for choice in choices]
    _spend_rest(choices, chosen, budget - _kept(choices, chosen))
    return Allocation(
        tuple(c.sizes[i] for c, i in zip(choices, chosen, strict=True)),
        _kept(choices, chosen),
        sum(float(c.costs[i]) for c, i in zip(choices, chosen, strict=True)),
    )


def not_rising(values: Sequence[float]) -> list[float]:
    """The nearest values in least squares that never rise, nor fall below 0, by pooling neighbours that do.

    More weights can only help, so that a rise is noise of the measurement: it is averaged out, not carried on.
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        total, count = float(value), 1
        while pools and pools[-1][0] / pools[-1][1] < total / count:
            before, members = pools.pop()
            total, count = total + before, count + members
        pools.append((total, count))
    return [max(total / count, 0.0) for total, count in pools for _ in range(count)]


class _Choices:
    """Every legal size of a curve, ascending, with the weights it keeps and what it costs."""

    def __init__(self, curve: Curve) -> None:
        self.sizes = curve.legal
        self.weights = torch.tensor([curve.kept(size) for size in self.sizes])
        # Costs grow with the square of what is lost, so that it is their root that is straight between two sizes.
        roots = torch.tensor([*not_rising(curve.costs), 0.0], dtype=torch.float64).sqrt()
        # Factors that keep nearly as many weights as their matrix still cost something: they are exact at full size.
        points = torch.tensor([*curve.sizes, curve.full], dtype=torch.float64)
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        self.costs = _interpolate(sizes, points, roots).square()

    def best(self, price: float) -> int:
        """Position of the size that is cheapest at a price per weight."""
        return int((self.costs + price * self.weights).argmin())

    def move(self, at: int, left: int) -> tuple[float, int] | None:
        """Cost saved per weight, and position, of the best larger size that ``left`` more weights pay for.

        It looks past flat and hollow stretches; of several as good it is the largest, so that free weights go at once.
        """
        added = self.weights[at + 1 :] - self.weights[at]
        added = added[added <= left]
        if not len(added):
            return None
        saved = (self.costs[at] - self.costs[at + 1 : at + 1 + len(added)]) / added
        best = len(saved) - 1 - int(saved.flip(0).argmax())
        return float(saved[best]), at + 1 + best


def _kept(choices: Sequence[_Choices], chosen: Sequence[int]) -> int:
    return sum(int(choice.weights[at]) for choice, at in zip(choices, chosen, strict=True))


def _spent(choices: Sequence[_Choices], price: float) -> int:
    return _kept(choices, [choice.best(price) for choice in choices])


def _spend_rest(choices: Sequence[_Choices], chosen: list[int], left: int) -> None:
    """Raise sizes while ``left`` weights last, each time by the move that saves most per weight."""
    moves: list[tuple[float, int, int]] = []

    def offer(number: int) -> None:
        if move := choices[number].move(chosen[number], left):
            heapq.heappush(moves, (-move[0], number, move[1]))

    for number in range(len(choices)):
        offer(number)
    while moves:
        _, number, to = heapq.heappop(moves)
        added = int(choices[number].weights[to] - choices[number].weights[chosen[number]])
        if added <= left:  # else others took its weights, and a smaller move may still do
            left -= added
            chosen[number] = to
        offer(number)


def _interpolate(x: Tensor, points: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (points, values), points ascending, x within them."""
    right = torch.searchsorted(points, x).clamp(1, len(points) - 1)
    share = (x - points[right - 1]) / (points[right] - points[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])
