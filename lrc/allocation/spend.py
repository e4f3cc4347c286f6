"""Spends a budget of weights where it saves most: from what shrinking each target alone costs, to its size."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lrc.methods.sizes import SizeValue

Currency = Literal["weights", "bytes", "width"]  # what a budget is of


@dataclass(frozen=True)
class Curve:
    """What shrinking one target costs, all else whole, in a unit that all curves of an allocation share.

    ``layer`` is None for the embedding and the head, which are outside the layers. ``costs`` are at ``sizes``, which
    keep ``weights`` each, ascending. At the ``full`` size the cost is 0. Factors of that size have ``exact`` weights,
    which may be more than the ``whole`` of the target as it is.
    """

    layer: int | None
    target: str
    sizes: tuple[SizeValue, ...]
    weights: tuple[int, ...]
    costs: tuple[float, ...]
    full: SizeValue
    exact: int
    whole: int

    @property
    def name(self) -> str:
        """The target and where it is."""
        return self.target if self.layer is None else f"{self.target} of layer {self.layer}"


@dataclass(frozen=True)
class Choice:
    """A size with the weights that it keeps, their bytes, and of a component the inner dimension left."""

    size: SizeValue
    weights: int
    bytes: int
    width: int


@dataclass(frozen=True)
class Offer:
    """A curve and the sizes that a budget may buy on it; ``whole``: the target left as it is, which may be one."""

    curve: Curve
    choices: tuple[Choice, ...]
    whole: Choice

    def ascending(self, currency: Currency) -> list[Choice]:
        """Return the choices by what they take of a budget; of several that take the same the one of most weights."""
        best = {price(each, currency): each for each in sorted(self.choices, key=lambda each: each.weights)}
        return [best[taken] for taken in sorted(best)]

    def smallest(self, currency: Currency = "weights") -> int:
        """Return what the cheapest choice takes."""
        return min(price(each, currency) for each in self.choices)

    def largest(self, currency: Currency = "weights") -> int:
        """Return what the dearest choice takes."""
        return max(price(each, currency) for each in self.choices)


def price(choice: Choice, currency: Currency) -> int:
    """Return what a choice takes of a budget."""
    return getattr(choice, currency)


@dataclass(frozen=True)
class Allocation:
    """Choices in the order of the offers, what they take of the budget and what their costs add up to."""

    choices: tuple[Choice, ...]
    taken: int
    cost: float

    @property
    def weights(self) -> int:
        """Weights kept."""
        return sum(choice.weights for choice in self.choices)


def allocate(offers: Sequence[Offer], budget: int, currency: Currency = "weights") -> Allocation:
    """Return the choices of least cost that take at most ``budget``; costs are taken to add up.

    One price per weight, or byte, decides every size (a Lagrange multiplier, found by bisection). What that leaves of
    the budget goes, step by step, where it saves most. ``budget`` is at least the sum of the offers' ``smallest``.
    """
    least = sum(offer.smallest(currency) for offer in offers)
    assert budget >= least, f"a budget of {budget} {currency} is below the smallest sizes, which take {least}"
    choices = [_Choices(offer, currency) for offer in offers]
    low, high = 0.0, 1e-12
    while _spent(choices, high) > budget:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _spent(choices, middle) > budget else (low, middle)
    chosen = [choice.best(high) for choice in choices]
    _spend_rest(choices, chosen, budget - _taken(choices, chosen))
    return Allocation(
        tuple(c.choices[i] for c, i in zip(choices, chosen, strict=True)),
        _taken(choices, chosen),
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
    """Every choice of an offer, ascending in what it takes of a budget, with what it costs."""

    def __init__(self, offer: Offer, currency: Currency) -> None:
        curve, self.choices = offer.curve, offer.ascending(currency)
        self.taken = torch.tensor([price(each, currency) for each in self.choices])
        # Costs grow with the square of what is lost, so that it is their root that is straight between two sizes.
        roots = torch.tensor([*not_rising(curve.costs), 0.0], dtype=torch.float64).sqrt()
        # Factors that keep nearly as many weights as their matrix still cost something: they are exact at full size.
        points = torch.tensor([*curve.weights, curve.exact], dtype=torch.float64)
        weights = [curve.exact if each == offer.whole else each.weights for each in self.choices]
        self.costs = _interpolate(torch.tensor(weights, dtype=torch.float64), points, roots).square()

    def best(self, price: float) -> int:
        """Position of the choice of least cost at a price per weight or byte."""
        return int((self.costs + price * self.taken).argmin())

    def move(self, at: int, left: int) -> tuple[float, int] | None:
        """Cost saved per weight, and position, of the best larger choice that ``left`` more of the budget pays for.

        It looks past flat and hollow stretches; of several as good it is the largest, so that free weights go at once.
        """
        added = self.taken[at + 1 :] - self.taken[at]
        added = added[added <= left]
        if not len(added):
            return None
        saved = (self.costs[at] - self.costs[at + 1 : at + 1 + len(added)]) / added
        best = len(saved) - 1 - int(saved.flip(0).argmax())
        return float(saved[best]), at + 1 + best


def _taken(choices: Sequence[_Choices], chosen: Sequence[int]) -> int:
    return sum(int(choice.taken[at]) for choice, at in zip(choices, chosen, strict=True))


def _spent(choices: Sequence[_Choices], price: float) -> int:
    return _taken(choices, [choice.best(price) for choice in choices])


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
        added = int(choices[number].taken[to] - choices[number].taken[chosen[number]])
        if added <= left:  # else others took its weights, and a smaller move may still do
            left -= added
            chosen[number] = to
        offer(number)


def _interpolate(x: Tensor, points: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (points, values), points ascending, x within them."""
    right = torch.searchsorted(points, x).clamp(1, len(points) - 1)
    share = (x - points[right - 1]) / (points[right] - points[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])
