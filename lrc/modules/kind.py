"""What a kind is: one way to store and run a factorized weight in place of an ``nn.Linear``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

Entry = dict[str, Any]


class StructuredLinear(nn.Module):
    """A linear map stored as factors.

    The zero-element buffer ``weight`` makes a load without lrc stop with a shape mismatch at the stock name
    instead of going on with random weights; model code also reads its dtype and device.
    """

    kind: ClassVar[str]
    factor_names: ClassVar[tuple[str, ...]]
    steps: ClassVar[int] = 2  # matrix products and permutations that a token goes through
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0))

    @classmethod
    @abstractmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Self:
        """Make an uninitialised module of the shapes in a table entry, on the ambient device and dtype."""

    @classmethod
    @abstractmethod
    def entry(cls, factors: Mapping[str, Tensor], bias: bool) -> Entry:
        """The JSON table entry (shapes only) of a module that holds these factors."""

    @abstractmethod
    def load_factors(self, factors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        """Take the factors over as parameters, in their own dtype."""

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors that it holds, as ``load_factors`` takes them."""
        held: dict[str, Any] = {name: getattr(self, name) for name in self.factor_names}
        return {name: each if isinstance(each, Tensor) else each.weight for name, each in held.items()}

    @property
    def offset(self) -> Tensor | None:
        """The bias (out,) that goes with them; None where there is none."""
        last = self.output_linear
        return getattr(self, "bias", None) if last is None else last.bias

    @staticmethod
    @abstractmethod
    def dense(factors: Mapping[str, Tensor]) -> Tensor:
        """The (out, in) matrix that the factors stand for."""

    @staticmethod
    @abstractmethod
    def parameter_count(entry: Mapping[str, Any]) -> int:
        """Number of weights, without the bias."""

    @property
    @abstractmethod
    def output_linear(self) -> nn.Linear | None:
        """The last linear map, which a refit may replace given its inputs; None where there is none."""
