"""What an allocation is: a plan at several sizes in, what every size of every target costs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lrc.allocation.spend import Curve
from lrc.calibration.draw import Texts
from lrc.checkpoint.reader import CheckpointReader
from lrc.compression.assemble import assemble
from lrc.families import Architecture
from lrc.methods.contract import Solution
from lrc.methods.sizes import SizeValue
from lrc.moments.gradient import GradientMoment
from lrc.plan.resolved import Assignment, LayerPlan, ResolvedPlan
from lrc.run.offload import ON_DEVICE, States
from lrc.run.processes import ALONE, Processes
from lrc.walk.backward import read_gradients
from lrc.walk.needs import solver_of
from lrc.walk.stream import ModelStream

Advance = Callable[[int], object]

# What the costs of all curves of an allocation are, and add up to.
Unit = Literal[
    "nats",  # rise of the loss per token, measured on held-out text
    "predicted nats",  # the same to second order, from gradients on the calibration text
    "relative squared error",  # E‖Δy‖² / E‖y‖², mean over the weights that the budget is of
    "squared shortfall",  # (weights lost / weights)², of every weight alike: nothing is known of the model
]


@dataclass(frozen=True)
class Setting:
    """A base plan resolved at several sizes, the texts, how layers run and where hidden states wait, and the processes
    that share the work.

    ``losses``: every problem is posed with gradients, so that its solution predicts a loss.
    """

    reader: CheckpointReader
    plans: Sequence[ResolvedPlan]
    texts: Texts
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    losses: bool = False
    states: States = ON_DEVICE
    processes: Processes = ALONE

    @property
    def stream(self) -> ModelStream:
        """The model, layer by layer."""
        return ModelStream(self.reader, self.device, self.dtype, self.states, processes=self.processes)

    @property
    def first_token(self) -> int:
        """What the first token of a block counts for in moments, as in a compression by the plans."""
        return self.plans[0].first_token

    def asked(self, layer: int | None) -> dict[tuple[str, SizeValue], Assignment]:
        """Everything that the plans ask of one layer, or None for outside the layers, by target and size."""
        return {(a.target, a.size): a for plan in self.plans for a in plan.unsized(layer)}

    def at_all_sizes(self, layer: int) -> LayerPlan:
        """One layer's assignments in all plans together."""
        return replace(self.plans[0].layers[layer], assignments=tuple(self.asked(layer).values()))

    def reduced(
        self, stream: ModelStream, index: int, state: Mapping[str, Tensor], solution: Solution
    ) -> nn.Module:
        """A layer, of its tensors by path, with nothing but one target solved, as a stream runs it on its device."""
        dtype, skeleton = self.reader.dtype, stream.skeletons[index]
        found = assemble(self.reader.architecture, skeleton, state, [solution], dtype)
        return stream.filled(found.module, found.state)

    def gradients(
        self, stream: ModelStream, held: Callable[[int], nn.Module] | None = None
    ) -> dict[int, GradientMoment]:
        """Gradient moments by layer, on the host, as a compression by the plans would have them, and with ``losses``
        those of every target; none where no layer reads any. ``held`` gives layers that are on the device already.
        """
        return read_gradients(
            stream,
            map(self.at_all_sizes, range(self.reader.architecture.layers)),
            self.plans[0].plan.calibration,
            self.texts.calibration.blocks,
            self.batch_size,
            losses=self.losses,
            held=held,
        )


@dataclass(frozen=True)
class Costs:
    """Curves with their costs in ``unit``; ``loss``: nats per held-out token of the model as it is, where measured."""

    curves: list[Curve]
    unit: Unit
    loss: float | None = None


@dataclass(frozen=True)
class Allocator:
    """One way to find what sizes cost.

    ``blank``: the curves there will be, without their costs, from shapes alone; it raises UserError for a plan that the
    allocation cannot do. ``costs``: the curves; its second argument is called with the steps done, ``steps`` of the
    blank curves in all. ``holds``: what of the model is on the device at once. ``keeps``: sizes are those of the plans,
    so that it matters at which fractions these are; else every size has its cost. ``held_out``: needs held-out text.
    ``losses``: reads gradients of every target, whatever its method; none are taken outside the layers, so that it
    knows no costs there.
    """

    summary: str
    blank: Callable[[Architecture, Sequence[ResolvedPlan]], list[Curve]]
    costs: Callable[[Setting, Advance], Costs]
    steps: Callable[[Architecture, Sequence[Curve]], int]
    holds: Literal["nothing", "layer", "model"]
    keeps: bool = False
    held_out: bool = False
    losses: bool = False


def blank_curves(
    architecture: Architecture, plans: Sequence[ResolvedPlan], *, every_size: bool = False
) -> list[Curve]:
    """Return curves of no cost at the sizes of the plans, the layers in their order, then what is outside of them.

    ``every_size``: at every size that the method can have instead. What stays whole in all plans has no curve.
    """
    found = []
    targets = architecture.targets | architecture.outer
    for index in (*range(architecture.layers), None):
        asked: dict[str, list[Assignment]] = {}
        for plan in plans:
            for one in plan.unsized(index):
                asked.setdefault(one.target, []).append(one)
        for name, ones in asked.items():
            first, target = ones[0], targets[name]
            rule, options = solver_of(first).size, first.options
            if every_size:
                by_weights = {rule.weights(target, n, options): n for n in rule.choices(target, options, 1)}
            else:
                by_weights = {one.kept: one.size for one in ones}
            weights, full = tuple(sorted(by_weights)), rule.full(target, options)
            sizes, costs = tuple(by_weights[kept] for kept in weights), (0.0,) * len(weights)
            exact = rule.weights(target, full, options)
            found.append(Curve(index, name, sizes, weights, costs, full, exact, first.whole))
    return found


def walk_steps(architecture: Architecture, curves: Sequence[Curve]) -> int:
    """Steps of an allocation that goes through the model once: a layer each, and one for what is outside of them."""
    return architecture.layers + any(curve.layer is None for curve in curves)
