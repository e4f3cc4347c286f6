"""What a kind is: one way to store and run a factorized weight in place of an ``nn.Linear``.

A kind may hold kinds: a sum of them, or a factor that is one. Its factors then hold ``Factors`` in place of tensors,
and its table entry their entries.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lrc.discovery import submodules

Entry = dict[str, Any]
Held = Mapping[str, Any]  # by name a tensor, or the Factors of a kind that is held


@dataclass(frozen=True)
class Factors:
    """One weight stored as the factors of a kind, and its bias (out,)."""

    kind: str
    tensors: Held
    bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Factors:
        """Return the same in a precision."""
        tensors = {name: each.to(dtype) for name, each in self.tensors.items()}
        return Factors(self.kind, tensors, None if self.bias is None else self.bias.to(dtype))

    @property
    def dense(self) -> Tensor:
        """The (out, in) matrix that the factors stand for."""
        return kinds()[self.kind].dense(self.tensors)


class StructuredLinear(nn.Module):
    """A linear map stored as factors.

    The zero-element buffer ``weight`` makes a load without lrc stop with a shape mismatch at the stock name
    instead of going on with random weights; model code also reads its dtype and device. ``tiny``: shapes of a small
    module as its table entry has them, for the contract tests.
    """

    kind: ClassVar[str]
    factor_names: ClassVar[tuple[str, ...]]
    tiny: ClassVar[Mapping[str, Any]]
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
    def entry(cls, factors: Held, bias: bool) -> Entry:
        """The JSON table entry (shapes only) of a module that holds these factors."""

    @abstractmethod
    def load_factors(self, factors: Held, bias: Tensor | None) -> None:
        """Take the factors over as parameters, in their own dtype."""

    @property
    def factors(self) -> dict[str, Any]:
        """The factors that it holds, as ``load_factors`` takes them."""
        held: dict[str, Any] = {name: getattr(self, name) for name in self.factor_names}
        return {name: _factor(each) for name, each in held.items()}

    @property
    def offset(self) -> Tensor | None:
        """The bias (out,) that goes with them; None where there is none."""
        last = self.output_linear
        return getattr(self, "bias", None) if last is None else last.bias

    @staticmethod
    @abstractmethod
    def dense(factors: Held) -> Tensor:
        """The (out, in) matrix that the factors stand for."""

    @staticmethod
    @abstractmethod
    def parameter_count(entry: Mapping[str, Any]) -> int:
        """Number of weights, without the bias."""

    @classmethod
    def byte_count(cls, entry: Mapping[str, Any], dtype: torch.dtype) -> int:
        """Bytes of the weights in a checkpoint of ``dtype``, without the bias."""
        return cls.parameter_count(entry) * dtype.itemsize

    @classmethod
    def operations(cls, entry: Mapping[str, Any]) -> int:
        """Multiplications that a token takes: here every weight is used once."""
        return cls.parameter_count(entry)

    @property
    @abstractmethod
    def output_linear(self) -> nn.Linear | None:
        """The last linear map, which a refit may replace given its inputs; None where there is none."""


def _factor(held: Any) -> Any:
    if isinstance(held, StructuredLinear):
        return Factors(held.kind, held.factors)
    return held if isinstance(held, Tensor) else held.weight


@cache
def kinds() -> dict[str, type[StructuredLinear]]:
    """Every storage kind, by the name that table entries give it."""
    found: dict[str, type[StructuredLinear]] = {}
    for _, module in submodules(sys.modules["lrc.modules"]):
        for item in vars(module).values():
            if isinstance(item, type) and issubclass(item, StructuredLinear) and hasattr(item, "kind"):
                found[item.kind] = item
    return found


def kind_of(entry: Mapping[str, Any]) -> type[StructuredLinear]:
    """Return the kind of a table entry."""
    return kinds()[entry["kind"]]


def with_nested(entry: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Return a table entry and all entries that it holds."""
    yield entry
    for value in entry.values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                yield from with_nested(each)
