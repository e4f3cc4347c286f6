"""Spend a budget: choose every target's size from the costs of shrinking each target alone."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from lrc.methods.sizes import SizeValue

Currency = Literal["weights", "bytes", "width"]  # unit of a budget


@dataclass(frozen=True)
class Curve:
    """Costs of shrinking one target, all else whole; all curves of an allocation share a unit.

    ``layer`` is None for the embedding and the head. ``sizes`` ascend by ``weights``. The cost of the ``full`` size
    is 0. Factors of full size have ``exact`` weights, which may exceed the original ``whole`` weights.
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
        """The target and its layer, for messages."""
        return self.target if self.layer is None else f"{self.target} of layer {self.layer}"


@dataclass(frozen=True)
class Choice:
    """A size with its weights and bytes; ``width``: the inner dimension of a component."""

    size: SizeValue
    weights: int
    bytes: int
    width: int


@dataclass(frozen=True)
class Offer:
    """A curve and the sizes that a budget may buy; ``whole``: the original target, which may be among them."""

    curve: Curve
    choices: tuple[Choice, ...]
    whole: Choice

    def prices(self, currency: Currency) -> list[int]:
        """Return what each choice takes of a budget."""
        return [getattr(choice, currency) for choice in self.choices]


@dataclass(frozen=True)
class Allocation:
    """One choice per offer, in order; ``taken``: the sum of their prices; ``cost``: the sum of their costs."""

    choices: tuple[Choice, ...]
    taken: int
    cost: float

    @property
    def weights(self) -> int:
        """Weights kept."""
        return sum(choice.weights for choice in self.choices)


def allocate(offers: Sequence[Offer], budget: int, currency: Currency = "weights") -> Allocation:
    """Return the choices of least total cost that take at most ``budget``, assuming that costs add up.

    Bisection finds one Lagrange multiplier, a price per weight or byte, for all offers. The rest of the budget then
    goes, step by step, where it saves most. ``budget`` must be at least the sum of the offers' lowest prices.
    """
    least = sum(min(offer.prices(currency)) for offer in offers)
    assert budget >= least, f"a budget of {budget} {currency} is below the smallest sizes, which take {least}"
    choices = [_Choices(offer, currency) for offer in offers]
    low, high = 0.0, 1e-12

    def best(price: float) -> list[int]:
        return [int((choice.costs + price * choice.taken).argmin()) for choice in choices]

    while _taken(choices, best(high)) > budget:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _taken(choices, best(middle)) > budget else (low, middle)
    chosen = best(high)
    _spend_rest(choices, chosen, budget - _taken(choices, chosen))
    return Allocation(
        tuple(c.choices[i] for c, i in zip(choices, chosen, strict=True)),
        _taken(choices, chosen),
        sum(float(c.costs[i]) for c, i in zip(choices, chosen, strict=True)),
    )


class _Choices:
    """Choices of one offer in ascending price, with interpolated costs; of equal prices the one of most weights."""

    def __init__(self, offer: Offer, currency: Currency) -> None:
        priced = sorted(
            zip(offer.prices(currency), offer.choices, strict=True), key=lambda each: each[1].weights
        )
        curve, by_price = offer.curve, dict(priced)
        self.choices = [by_price[price] for price in sorted(by_price)]
        self.taken = torch.tensor(sorted(by_price))
        # More weights can only help, so a rise is measurement noise.
        costs = isotonic_regression(curve.costs, increasing=False).x.clip(min=0)
        # Factors with nearly as many weights as their matrix still cost something: only full-size factors are exact.
        weights = [curve.exact if each == offer.whole else each.weights for each in self.choices]
        power = _power(curve, costs)
        roots = np.interp(weights, [*curve.weights, curve.exact], [*costs ** (1 / power), 0.0])
        self.costs = torch.from_numpy(roots**power)

    def move(self, at: int, left: int) -> tuple[float, int] | None:
        """Return the saving per weight and the index of the best larger choice that adds at most ``left``.

        All larger choices compete, also beyond flat parts of the curve; the largest wins a tie.
        """
        added = self.taken[at + 1 :] - self.taken[at]
        added = added[added <= left]
        if not len(added):
            return None
        saved = (self.costs[at] - self.costs[at + 1 : at + 1 + len(added)]) / added
        best = len(saved) - 1 - int(saved.flip(0).argmax())
        return float(saved[best]), at + 1 + best


def _power(curve: Curve, costs: np.ndarray) -> float:
    """Return the power of the removed weights that costs grow with at the largest sizes, from 1 to 2.

    A projection whose singular values fall fast loses by the square, an MLP whose neurons count alike in proportion.
    Removed are weights of the full-rank factors. It is 2 where no two neighbouring sizes have different costs above 0.
    """
    points = [(curve.exact - weights, cost) for weights, cost in zip(curve.weights, costs, strict=True)]
    for (more, higher), (less, lower) in reversed(list(pairwise(points))):
        if higher > lower > 0:
            slope = (math.log(higher) - math.log(lower)) / (math.log(more) - math.log(less))
            return min(max(slope, 1.0), 2.0)
    return 2.0


def _taken(choices: Sequence[_Choices], chosen: Sequence[int]) -> int:
    return sum(int(choice.taken[at]) for choice, at in zip(choices, chosen, strict=True))


def _spend_rest(choices: Sequence[_Choices], chosen: list[int], left: int) -> None:
    """Raise sizes in place with the ``left`` budget, each time by the move that saves most per weight."""
    moves: list[tuple[float, int, int]] = []

    def offer(number: int) -> None:
        if move := choices[number].move(chosen[number], left):
            heapq.heappush(moves, (-move[0], number, move[1]))

    for number in range(len(choices)):
        offer(number)
    while moves:
        _, number, to = heapq.heappop(moves)
        added = int(choices[number].taken[to] - choices[number].taken[chosen[number]])
        if added <= left:  # else earlier moves took the budget, but a smaller move may fit
            left -= added
            chosen[number] = to
        offer(number)
