"""What a statistic is: sums over the calls of one layer, and what they give each target.

A statistic is a class with a ``name`` in a file of this folder. A solver that has the name in its ``needs`` finds the
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

# What was found of a layer, by statistic and target.
Found = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Layer:
    """A decoder layer of the original on the device, with its tensors by path in the checkpoint's precision.

    ``dtype``: the precision of the products inside. ``processes``: split the blocks. ``first_token``:
    how many tokens the first one of a block counts for.
    """

    architecture: Architecture
    index: int
    module: nn.Module
    state: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    processes: Processes
    first_token: int = 1

    def cast(self, x: Tensor) -> Tensor:
        """Return activations as the products inside the layer see them."""
        return x.to(self.dtype)


class Observer(ABC):
    """Sees the calls of some modules of the layer ``index`` while a walk runs it, batch after batch."""

    index: int

    @property
    @abstractmethod
    def watched(self) -> Collection[str]:
        """Paths in the layer of the modules whose calls ``add`` reads."""

    @abstractmethod
    def add(self, calls: Mapping[str, Call]) -> None:
        """Count one batch, from the calls by path."""

    @abstractmethod
    def reduce(self, processes: Processes) -> None:
        """Add what the other processes have counted; all of them call it, in the same order."""


class Statistic(Observer):
    """Running sums of one layer for ``targets``, those whose solvers have its ``name`` in their needs."""

    name: ClassVar[str]

    def __init__(self, layer: Layer, targets: Iterable[str]) -> None:
        self.index, self.layer, self.targets = layer.index, layer, tuple(targets)

    @abstractmethod
    def result(self) -> Mapping[str, Any]:
        """Return what was found for each target, over all processes. Raise UserError where it is NaN or inf."""
