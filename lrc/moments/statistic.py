"""Define statistics: sums over the calls of one layer, with a result for each target.

A statistic is a class with a ``name`` in a file of this folder. A solver with that name in its ``needs`` gets the
result for its target in ``problem.statistics``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lrc.families import Architecture
from lrc.moments.observe import Call
from lrc.run.processes import Processes

# Results of a layer, by statistic and target.
Found = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Layer:
    """A decoder layer of the original on the device, with its tensors by path in the checkpoint's precision.

    ``dtype``: the precision of the products inside. ``processes`` split the blocks. ``first_token``: the weight of a
    block's first token.
    """

    architecture: Architecture
    index: int
    module: nn.Module
    state: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    processes: Processes
    first_token: int = 1


class Observer(ABC):
    """An observer of module calls in layer ``index`` while a walk runs that layer, batch by batch."""

    index: int

    @property
    @abstractmethod
    def watched(self) -> Collection[str]:
        """Return the paths in the layer of the modules whose calls ``add`` reads."""

    @abstractmethod
    def add(self, calls: Mapping[str, Call]) -> None:
        """Add one batch, from the calls by path."""

    @abstractmethod
    def reduce(self, processes: Processes) -> None:
        """Add the sums of the other processes; all processes call this in the same order."""


class Statistic(Observer):
    """Running sums of one layer for ``targets``, whose solvers need this ``name``."""

    name: ClassVar[str]

    def __init__(self, layer: Layer, targets: Iterable[str]) -> None:
        self.index, self.layer, self.targets = layer.index, layer, tuple(targets)

    @abstractmethod
    def result(self) -> Mapping[str, Any]:
        """Return the result for each target, over all processes. Raises UserError for NaN or inf."""
