"""Build the problems of a setting's plans in one walk, with one layer on the device at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lrc.allocation.contract import Advance, Setting
from lrc.compression.solve import pose
from lrc.compression.tables import pose_outer
from lrc.methods.contract import Problem
from lrc.methods.sizes import SizeValue
from lrc.moments.gradient import GradientMoment
from lrc.plan.resolved import Assignment
from lrc.text.blocks import batched
from lrc.walk.walk import Visit, Walk


@dataclass(frozen=True)
class Posed:
    """Assignments by target and size, and problems by target, of one ``layer`` (None: outside the layers).

    ``state``: the layer's tensors by path.
    """

    layer: int | None
    asked: Mapping[tuple[str, SizeValue], Assignment]
    problems: Mapping[str, Problem]
    state: Mapping[str, Tensor] = field(default_factory=dict)


def each_posed(setting: Setting, look: Callable[[Posed], object], advance: Advance) -> None:
    """Call ``look`` for every layer with assignments, then for the targets outside the layers.

    Problems come from the calibration blocks; a sweep for gradients runs first if solvers need them. ``advance`` is
    called after each of these steps. ``look`` must not keep problems, so that their moments are freed.
    """
    stream = setting.stream
    gradients = setting.gradients(stream)
    blocks = setting.texts.calibration.blocks
    batches = stream.embed(batched(setting.processes.mine(blocks), setting.batch_size))
    for visit in Walk(stream, batches, first_token=setting.first_token):
        if setting.asked(visit.index):
            look(_posed(setting, visit, gradients.pop(visit.index, None)))
        advance(1)
    if outside := setting.asked(None):
        targets = dict.fromkeys(target for target, _ in outside)
        look(Posed(None, outside, pose_outer(stream, targets, blocks, batches)))
        advance(1)


def _posed(setting: Setting, visit: Visit, gradients: GradientMoment | None) -> Posed:
    asked, state = setting.asked(visit.index), visit.layer.state
    found = visit.read(setting.at_all_sizes(visit.index), gradients)
    targets = dict.fromkeys(target for target, _ in asked)
    problems = {target: pose(setting.reader.architecture, target, state, found) for target in targets}
    return Posed(visit.index, asked, problems, state)
