"""Allocations: ways to find what each size of each target costs, so that a budget buys the cheapest sizes.

To add one, add a file here and an entry below. ``spend`` spends a budget on the curves of any allocation.
"""

from __future__ import annotations

from collections.abc import Mapping

from lrc.allocation import importance, predicted, sensitivity, uniform
from lrc.allocation.contract import Allocator, blank_curves, walk_steps

ALLOCATORS: Mapping[str, Allocator] = {
    "uniform": Allocator(
        "the same fraction of every target; nothing is measured",
        uniform.blank,
        uniform.costs,
        steps=lambda architecture, curves: 0,
        holds="nothing",
    ),
    "energy": Allocator(
        "equal marginal predicted error per weight, relative to each target's own output",
        blank_curves,
        predicted.energy_costs,
        walk_steps,
        holds="layer",
        keeps=True,
    ),
    "fisher": Allocator(
        "equal marginal predicted loss per weight, from gradients of the loss",
        blank_curves,
        predicted.fisher_costs,
        walk_steps,
        holds="layer",
        keeps=True,
        losses=True,
    ),
    "importance": Allocator(
        "singular directions of all matrices sorted by the loss that each is worth, from gradients",
        importance.blank,
        importance.costs,
        walk_steps,
        holds="layer",
        losses=True,
    ),
    "sensitivity": Allocator(
        "the loss on held-out text with each target alone shrunk, measured",
        blank_curves,
        sensitivity.costs,
        sensitivity.passes,
        holds="model",
        keeps=True,
        held_out=True,
    ),
}
