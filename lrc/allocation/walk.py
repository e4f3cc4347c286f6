"""Goes through a model once, a layer at a time, and stops at each with the statistics that its solvers read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from lrc.allocation.contract import Setting
from lrc.collect import Statistics
from lrc.plan.resolved import Assignment
from lrc.solve import read_statistics
from lrc.stream import ModelStream


@dataclass(frozen=True)
class Stop:
    """One layer: its tensors by path, what the plans ask of it by target and size, and what solving that takes."""

    index: int
    state: Mapping[str, Tensor]
    asked: Mapping[tuple[str, int], Assignment]
    statistics: Statistics


def walk(setting: Setting) -> Iterator[Stop]:
    """Every layer of which something is asked, on the calibration blocks, after a sweep for the gradients where any
    are read; only one is on the device at a time."""
    stream = ModelStream(setting.reader, setting.device, setting.dtype)
    architecture, gradients = setting.reader.architecture, setting.gradients(stream)
    batches = stream.embed(setting.texts.calibration.blocks, setting.batch_size)
    for index in range(architecture.layers):
        layer, state = stream.layer(index)
        if asked := setting.asked(index):
            plan, found = setting.at_all_sizes(index), gradients.pop(index, None)
            yield Stop(index, state, asked, read_statistics(stream, plan, layer, state, batches, found))
        for batch in batches:
            batch.hidden = stream.run(layer, index, batch, batch.hidden)
