"""Allocations: ways to find what each size of each target costs, so that a budget buys the cheapest sizes.

To add one, add a function that finds costs and an entry below and its name in
``lrc.plan.schema.Allocation``. ``spend`` spends a budget on any allocation's curves.
"""

from __future__ import annotations

from collections.abc import Mapping

from lrc.allocation import predicted, sensitivity
from lrc.allocation.contract import Allocator

ALLOCATORS: Mapping[str, Allocator] = {
    "uniform": Allocator(
        "the same fraction of every target; nothing is measured",
        "squared shortfall",
        predicted.uniform_costs,
        holds="nothing",
    ),
    "energy": Allocator(
        "equal marginal predicted error per weight, relative to each target's own output",
        "relative squared error",
        predicted.energy_costs,
        keeps=True,
    ),
    "fisher": Allocator(
        "equal marginal predicted loss per weight, from gradients of the loss",
        "predicted nats",
        predicted.fisher_costs,
        keeps=True,
        losses=True,
    ),
    "importance": Allocator(
        "singular directions of all matrices sorted by the loss that each is worth, from gradients",
        "predicted nats",
        predicted.importance_costs,
        losses=True,
        refuse=predicted.refuse_without_directions,
    ),
    "sensitivity": Allocator(
        "KL from the original on held-out text with each target alone shrunk, measured",
        "nats",
        sensitivity.costs,
        sensitivity.passes,
        holds="model",
        keeps=True,
        held_out=True,
    ),
}
