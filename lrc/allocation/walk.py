"""Goes through a model once, a layer at a time, and stops at each with the problems that its solvers are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lrc.allocation.contract import Setting
from lrc.methods.contract import Problem
from lrc.outer import pose_outer
from lrc.plan.resolved import Assignment
from lrc.solve import pose, read_statistics
from lrc.text.blocks import batched


@dataclass(frozen=True)
class Stop:
    """One layer, or None for what is outside of them: what the plans ask of it by target and size, and the problems by
    target. ``done``: steps of the way up to here and with it. ``state``: the layer's tensors, none outside of them.
    """

    layer: int | None
    asked: Mapping[tuple[str, int], Assignment]
    problems: Mapping[str, Problem]
    done: int
    state: Mapping[str, Tensor] = field(default_factory=dict)


def walk(setting: Setting) -> Iterator[Stop]:
    """Every layer of which something is asked, on the calibration blocks, after a sweep for the gradients where any
    are read, and then what is outside of them; only one layer is on the device at a time."""
    stream = setting.stream
    architecture, gradients = setting.reader.architecture, setting.gradients(stream)
    mine = setting.ranks.mine(setting.texts.calibration.blocks)
    batches = stream.embed(batched(mine, setting.batch_size))
    for index in range(architecture.layers):
        layer, state = stream.layer(index)
        if asked := setting.asked(index):
            plan, found = setting.at_all_sizes(index), gradients.pop(index, None)
            statistics = read_statistics(stream, plan, layer, state, batches, found)
            problems = {target: pose(architecture, target, state, statistics) for target, _ in asked}
            yield Stop(index, asked, problems, index + 1, state)
        stream.advance(layer, index, batches)
    if asked := setting.asked(None):
        problems = pose_outer(
            stream, {target for target, _ in asked}, setting.texts.calibration.blocks, batches
        )
        yield Stop(None, asked, problems, architecture.layers + 1)
