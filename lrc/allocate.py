"""Spends a budget of weights where it saves most loss: from what shrinking each target alone costs, to its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.errors import UserError


@dataclass(frozen=True)
class Curve:
    """What shrinking one target of one layer costs, all else whole.

    ``nats`` is the rise of the loss at the measured ``sizes``, which ascend and leave out the ``full`` one, where it
    is 0. A size keeps ``unit`` weights for each of it, the full one ``whole``; legal sizes are multiples of ``step``.
    """

    layer: int
    target: str
    sizes: tuple[int, ...]
    nats: tuple[float, ...]
    full: int
    unit: int
    whole: int
    step: int = 1


@dataclass(frozen=True)
class Allocation:
    """Sizes in the order of the curves, the weights they keep and the rise of the loss that the curves add up to."""

    sizes: tuple[int, ...]
    weights: int
    nats: float


def allocate(curves: Sequence[Curve], budget: int) -> Allocation:
    """The sizes of least predicted loss that keep at most ``budget`` of the curves' weights; costs are taken to add up.

    One price per weight decides every size (a Lagrange multiplier, found by bisection); what that leaves of the budget
    goes, step by step, where a weight saves most. Raises UserError where even the smallest measured sizes keep more.
    """
    choices = [_Choices(curve) for curve in curves]
    least, whole = (sum(int(c.weights[end]) for c in choices) for end in (0, -1))
    if budget < least:
        raise UserError(
            f"a keep of {budget / whole:.3f} cannot be met; the smallest that was measured is {least / whole:.3f}"
        )
    low, high = 0.0, 1e-12
    while _spent(choices, high) > budget:
        high *= 2
    for _ in range(60):
        price = (low + high) / 2
        low, high = (price, high) if _spent(choices, price) > budget else (low, price)
    chosen = [choice.best(high) for choice in choices]
    _spend_rest(choices, chosen, budget)
    return Allocation(
        tuple(int(c.sizes[i]) for c, i in zip(choices, chosen, strict=True)),
        sum(int(c.weights[i]) for c, i in zip(choices, chosen, strict=True)),
        sum(float(c.nats[i]) for c, i in zip(choices, chosen, strict=True)),
    )


class _Choices:
    """Every legal size of a curve, ascending, with the weights it keeps and the nats it costs."""

    def __init__(self, curve: Curve) -> None:
        first = -(-curve.sizes[0] // curve.step) * curve.step
        sizes = torch.arange(first, curve.full, curve.step)
        sizes = sizes[
            sizes * curve.unit < curve.whole
        ]  # a pair may be larger than its matrix long before full rank
        self.sizes = torch.cat([sizes, torch.tensor([curve.full])])
        self.weights = torch.cat([sizes * curve.unit, torch.tensor([curve.whole])])
        # More can only help, whatever the noise of the measurement says; and costs grow with the square of what is
        # lost, so that it is their root that is straight between the sizes measured.
        nats = (
            torch.tensor([*curve.nats, 0.0], dtype=torch.float64)
            .clamp_min(0)
            .flip(0)
            .cummax(0)
            .values.flip(0)
        )
        points = torch.tensor(
            [*(size * curve.unit for size in curve.sizes), curve.whole], dtype=torch.float64
        )
        self.nats = _interpolate(self.weights.double(), points, nats.sqrt()).square()

    def best(self, price: float) -> int:
        """Position of the size that is cheapest at a price per weight."""
        return int((self.nats + price * self.weights).argmin())


def _spent(choices: Sequence[_Choices], price: float) -> int:
    return sum(int(choice.weights[choice.best(price)]) for choice in choices)


def _spend_rest(choices: Sequence[_Choices], chosen: list[int], budget: int) -> None:
    """Raise sizes while the budget lasts, each time the one that saves most per weight among those that fit."""
    left = budget - sum(int(c.weights[i]) for c, i in zip(choices, chosen, strict=True))
    while True:
        best, gain = None, -1.0
        for number, (choice, at) in enumerate(zip(choices, chosen, strict=True)):
            fits = (choice.weights[at + 1 :] - choice.weights[at] <= left).nonzero()
            if not len(fits):
                continue
            ahead = at + 1 + int(fits[-1])  # looking past flat or hollow stretches to the last size that fits
            saved = float(choice.nats[at] - choice.nats[ahead]) / int(
                choice.weights[ahead] - choice.weights[at]
            )
            if saved > gain:
                best, gain, to = number, saved, at + 1
        if best is None:
            return
        left -= int(choices[best].weights[to] - choices[best].weights[chosen[best]])
        chosen[best] = to


def _interpolate(x: Tensor, points: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (points, values), points ascending, x within them."""
    right = torch.searchsorted(points, x).clamp(1, len(points) - 1)
    share = (x - points[right - 1]) / (points[right] - points[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])
