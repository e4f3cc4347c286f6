"""The contract of an allocation: from a plan at several sizes to the cost of each size of each target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lrc.allocation.spend import Curve
from lrc.calibration.draw import Texts
from lrc.checkpoint.reader import CheckpointReader
from lrc.compression.assemble import assemble
from lrc.compression.embedding import make_outer_problems
from lrc.compression.solve import make_problem
from lrc.errors import UserError
from lrc.families import Architecture
from lrc.methods.contract import Problem, Solution
from lrc.methods.sizes import SizeValue
from lrc.moments.gradient import GradientMoment
from lrc.plan.resolved import Assignment, LayerPlan, ResolvedPlan
from lrc.run.offload import ON_DEVICE, States
from lrc.run.processes import ALONE, Processes
from lrc.run.settings import Progress, unseen
from lrc.text.blocks import batched
from lrc.walk.backward import read_gradients
from lrc.walk.needs import solver_of
from lrc.walk.stream import ModelStream
from lrc.walk.walk import Visit, Walk

Advance = Callable[[int], object]

# Unit of an allocation's costs and of their sum.
Unit = Literal[
    "nats",  # KL divergence from the original per token, measured on held-out text
    "predicted nats",  # second-order prediction from gradients on the calibration text
    "relative squared error",  # E‖Δy‖² / E‖y‖², averaged over the weights in the budget
    "squared shortfall",  # (weights removed / weights)², the same for every weight; nothing is measured
]


@dataclass(frozen=True)
class Setting:
    """Inputs of an allocation: a base plan resolved at several sizes, the texts, and how to run the layers.

    ``losses``: give every problem gradients, so that its solution predicts a loss. ``states``: where hidden states are
    offloaded. ``processes``: the processes that share the work. ``start`` starts the progress of gradients.
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
    start: Progress = unseen

    @property
    def stream(self) -> ModelStream:
        """New stream over the model's layers."""
        return ModelStream(self.reader, self.device, self.dtype, self.states, processes=self.processes)

    @property
    def first_token(self) -> int:
        """Weight of a block's first token in moments, as the plans set it."""
        return self.plans[0].first_token

    def assignments(self, layer: int | None) -> dict[tuple[str, SizeValue], Assignment]:
        """Return all plans' assignments of one layer (None: outside the layers), by target and size."""
        return {(a.target, a.size): a for plan in self.plans for a in plan.unsized(layer)}

    def at_all_sizes(self, layer: int) -> LayerPlan:
        """Return one layer with the assignments of all plans."""
        return replace(self.plans[0].layers[layer], assignments=tuple(self.assignments(layer).values()))

    def reduced(
        self, stream: ModelStream, index: int, state: Mapping[str, Tensor], solution: Solution
    ) -> nn.Module:
        """Return a layer on the stream's device with one target compressed; ``state``: its original tensors by path."""
        found = assemble(self.reader.architecture, stream.skeletons[index], state, [solution])
        return stream.filled(found.module, found.state)

    def gradients(
        self, stream: ModelStream, held: Callable[[int], nn.Module] | None = None
    ) -> dict[int, GradientMoment]:
        """Return gradient moments by layer, offloaded as states are; none for layers whose solvers need none.

        With ``losses``, every target gets gradients. ``held`` returns layers that are already on the device.
        """
        return read_gradients(
            stream,
            map(self.at_all_sizes, range(self.reader.architecture.layers)),
            self.plans[0].plan.calibration,
            self.texts.calibration.blocks,
            self.batch_size,
            losses=self.losses,
            held=held,
            start=self.start,
        )


@dataclass(frozen=True)
class LayerProblems:
    """Assignments by target and size, and problems by target, of one ``layer`` (None: outside the layers).

    ``state``: the layer's tensors by path.
    """

    layer: int | None
    assignments: Mapping[tuple[str, SizeValue], Assignment]
    problems: Mapping[str, Problem]
    state: Mapping[str, Tensor] = field(default_factory=dict)


def for_each_layer(setting: Setting, look: Callable[[LayerProblems], object], advance: Advance) -> None:
    """Call ``look`` for every layer with assignments, then for the targets outside the layers.

    Problems come from the calibration blocks; a sweep for gradients runs first if solvers need them. ``advance`` is
    called after each of these steps. ``look`` must not keep problems, so that their moments are freed.
    """
    stream = setting.stream
    gradients = setting.gradients(stream)
    blocks = setting.texts.calibration.blocks
    batches = stream.embed(batched(setting.processes.mine(blocks), setting.batch_size))
    for visit in Walk(stream, batches, first_token=setting.first_token):
        if setting.assignments(visit.index):
            look(_problems(setting, visit, gradients.pop(visit.index, None)))
        advance(1)
    if outside := setting.assignments(None):
        targets = dict.fromkeys(target for target, _ in outside)
        look(LayerProblems(None, outside, make_outer_problems(stream, targets, blocks, batches)))
        advance(1)


def _problems(setting: Setting, visit: Visit, gradients: GradientMoment | None) -> LayerProblems:
    assignments, state = setting.assignments(visit.index), visit.layer.state
    found = visit.read(setting.at_all_sizes(visit.index), gradients)
    targets = dict.fromkeys(target for target, _ in assignments)
    problems = {target: make_problem(setting.reader.architecture, target, state, found) for target in targets}
    return LayerProblems(visit.index, assignments, problems, state)


def walk_steps(architecture: Architecture, curves: Sequence[Curve]) -> int:
    """Return the steps of one pass over the model: one per layer, plus one for tables with curves."""
    return architecture.layers + any(curve.layer is None for curve in curves)


@dataclass(frozen=True)
class Allocator:
    """One way to find what sizes cost.

    ``costs`` returns curves with costs in ``unit``, and the original's nats per held-out token if it measured them. It
    calls its last argument with the steps done; ``steps`` returns their total. ``holds``: the part of the model on the
    device at once. ``keeps``: costs are known only at the plans' sizes. ``held_out``: needs held-out text. ``losses``:
    reads gradients of every target, so only targets in layers work. ``refuse`` raises UserError for an assignment that
    it does not support.
    """

    summary: str
    unit: Unit
    costs: Callable[[Setting, Sequence[Curve], Advance], tuple[list[Curve], float | None]]
    steps: Callable[[Architecture, Sequence[Curve]], int] = walk_steps
    holds: Literal["nothing", "layer", "model"] = "layer"
    keeps: bool = False
    held_out: bool = False
    losses: bool = False
    refuse: Callable[[Assignment], None] | None = None

    def blank(self, architecture: Architecture, plans: Sequence[ResolvedPlan]) -> list[Curve]:
        """Return curves of zero cost, layer by layer, then those outside the layers.

        They have the plans' sizes, or every size that the method allows if costs are known for all. Targets that no
        plan shrinks have no curve. Raises UserError for an unsupported plan.
        """
        if self.losses and (tables := plans[0].shared):
            raise UserError(
                f"gradients are taken in the layers alone, so allocations by gradients find no size for "
                f"{' and '.join(tables)}; allocate by uniform, energy or sensitivity, or write a size there"
            )
        found = []
        targets = architecture.targets | architecture.outer
        for index in (*range(architecture.layers), None):
            by_target: dict[str, list[Assignment]] = {}
            for plan in plans:
                for one in plan.unsized(index):
                    by_target.setdefault(one.target, []).append(one)
                    if self.refuse:
                        self.refuse(one)
            for name, ones in by_target.items():
                first, target = ones[0], targets[name]
                rule, options = solver_of(first).size, first.options
                if self.keeps:
                    by_weights = {one.kept: one.size for one in ones}
                else:
                    by_weights = {
                        rule.weights(target, n, options): n for n in rule.choices(target, options, 1)
                    }
                weights, full = tuple(sorted(by_weights)), rule.full(target, options)
                sizes, costs = tuple(by_weights[kept] for kept in weights), (0.0,) * len(weights)
                exact = rule.weights(target, full, options)
                found.append(Curve(index, name, sizes, weights, costs, full, exact, first.whole))
        return found

    def curves(self, setting: Setting, advance: Advance) -> tuple[list[Curve], float | None]:
        """Return the curves of a setting's plans with costs, and the original's loss as ``costs`` does."""
        return self.costs(setting, self.blank(setting.reader.architecture, setting.plans), advance)
