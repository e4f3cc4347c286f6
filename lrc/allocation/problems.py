"""The problems that a setting's plans pose, a layer at a time: one walk, so that only one layer is on the device."""

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
    """One layer, or None for outside the layers: what the plans ask of it by target and size, the problems by target,
    and the layer's tensors by path.
    """

    layer: int | None
    asked: Mapping[tuple[str, SizeValue], Assignment]
    problems: Mapping[str, Problem]
    state: Mapping[str, Tensor] = field(default_factory=dict)


def each_posed(setting: Setting, look: Callable[[Posed], object], advance: Advance) -> None:
    """Call ``look`` with every layer of which the plans ask something, and then with what is outside the layers.

    Problems are posed from the calibration blocks, after a sweep for the gradients where any are read. ``advance`` is
    called after every layer, and after what is outside. ``look`` must keep no problem: moments go when it returns.
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
