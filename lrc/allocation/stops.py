"""Goes through a model once, a layer at a time, and stops at each with the problems that its solvers are given."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from lrc.allocation.contract import Setting
from lrc.compression.solve import pose
from lrc.compression.tables import pose_outer
from lrc.methods.contract import Problem
from lrc.methods.sizes import SizeValue
from lrc.moments.gradient import GradientMoment
from lrc.plan.resolved import Assignment, LayerPlan
from lrc.text.blocks import batched
from lrc.walk.statistics import Statistics
from lrc.walk.stream import Batch, ModelStream
from lrc.walk.walk import read_statistics


@dataclass(frozen=True)
class Visit:
    """One layer of the original, its tensors by path, what its solvers read, and the batches in front of it."""

    index: int
    layer: nn.Module
    state: Mapping[str, Tensor]
    statistics: Statistics
    batches: Sequence[Batch]


@dataclass(frozen=True)
class Stop:
    """One layer, or None for what is outside of them: what the plans ask of it by target and size, and the problems by
    target. ``done``: steps of the way up to here and with it. ``state``: the layer's tensors, none outside of them.
    """

    layer: int | None
    asked: Mapping[tuple[str, SizeValue], Assignment]
    problems: Mapping[str, Problem]
    done: int
    state: Mapping[str, Tensor] = field(default_factory=dict)


def visits(
    stream: ModelStream,
    plans: Mapping[int, LayerPlan],
    batches: Sequence[Batch],
    gradients: dict[int, GradientMoment],
    end: int,
    first_token: int,
    sites: Collection[str] = (),
) -> Iterator[Visit]:
    """Stop at every layer that has a plan, with what its solvers read and the moments at ``sites`` beside, and take the
    batches past the first ``end`` layers; only one layer is on the device at a time."""
    for index in range(end):
        layer, state = stream.layer(index)
        if (plan := plans.get(index)) is not None:
            found = gradients.pop(index, None)
            # No name of its own here: moments go when whoever is given them lets go.
            yield Visit(
                index,
                layer,
                state,
                read_statistics(stream, plan, layer, state, batches, found, first_token, sites),
                batches,
            )
            del found
        stream.advance(layer, index, batches)


def walk(setting: Setting) -> Iterator[Stop]:
    """Every layer of which something is asked, on the calibration blocks, after a sweep for the gradients where any
    are read, and then what is outside of them; only one layer is on the device at a time."""
    stream = setting.stream
    architecture, gradients = setting.reader.architecture, setting.gradients(stream)
    mine = setting.ranks.mine(setting.texts.calibration.blocks)
    batches = stream.embed(batched(mine, setting.batch_size))
    asked = {index: found for index in range(architecture.layers) if (found := setting.asked(index))}
    plans = {index: setting.at_all_sizes(index) for index in asked}
    for visit in visits(stream, plans, batches, gradients, architecture.layers, setting.first_token):
        found = asked[visit.index]
        problems = {target: pose(architecture, target, visit.state, visit.statistics) for target, _ in found}
        yield Stop(visit.index, found, problems, visit.index + 1, visit.state)
    if outside := setting.asked(None):
        problems = pose_outer(
            stream, {target for target, _ in outside}, setting.texts.calibration.blocks, batches
        )
        yield Stop(None, outside, problems, architecture.layers + 1)
