"""Define a kind: one way to store and run a factorized weight that replaces an ``nn.Linear``.

A kind may nest kinds, as summands or factors. It then holds their ``Factors`` in place of tensors, and its table entry
holds their entries.
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
Held = Mapping[str, Any]  # by name a tensor, or the Factors of a nested kind


@dataclass(frozen=True)
class Factors:
    """Hold one weight as the factors of a kind, and its bias (out,)."""

    kind: str
    tensors: Held
    bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Factors:
        """Return the factors and bias in ``dtype``."""
        tensors = {name: each.to(dtype) for name, each in self.tensors.items()}
        return Factors(self.kind, tensors, None if self.bias is None else self.bias.to(dtype))

    @property
    def dense(self) -> Tensor:
        """Return the (out, in) matrix that the factors represent."""
        return kinds()[self.kind].dense(self.tensors)


class StructuredLinear(nn.Module):
    """A linear map stored as factors.

    The zero-element buffer ``weight`` makes a load without lrc fail with a shape mismatch, instead of running random
    weights. Model code also reads its dtype and device. ``tiny``: table entry of a small module, for contract tests.
    """

    kind: ClassVar[str]
    factor_names: ClassVar[tuple[str, ...]]
    tiny: ClassVar[Mapping[str, Any]]
    steps: ClassVar[int] = 2  # matrix products and permutations for a token
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0))

    @classmethod
    @abstractmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Self:
        """Make an uninitialised module with the shapes of a table entry, on the default device and dtype."""

    @classmethod
    @abstractmethod
    def entry(cls, factors: Held, bias: bool) -> Entry:
        """Return the JSON table entry (shapes only) of a module with these factors."""

    @abstractmethod
    def load_factors(self, factors: Held, bias: Tensor | None) -> None:
        """Make the factors this module's parameters, in their own dtype."""

    @property
    def factors(self) -> dict[str, Any]:
        """Return the factors, as ``load_factors`` takes them."""
        held: dict[str, Any] = {name: getattr(self, name) for name in self.factor_names}
        return {name: _factor(each) for name, each in held.items()}

    @property
    def offset(self) -> Tensor | None:
        """Return the bias (out,), or None."""
        last = self.output_linear
        return getattr(self, "bias", None) if last is None else last.bias

    @staticmethod
    @abstractmethod
    def dense(factors: Held) -> Tensor:
        """Return the (out, in) matrix that the factors represent."""

    @staticmethod
    @abstractmethod
    def parameter_count(entry: Mapping[str, Any]) -> int:
        """Return the number of weights, without the bias."""

    @classmethod
    def operations(cls, entry: Mapping[str, Any]) -> int:
        """Return the multiplications for a token; by default one for every weight."""
        return cls.parameter_count(entry)

    @property
    @abstractmethod
    def output_linear(self) -> nn.Linear | None:
        """Return the last linear map, which a refit may replace, or None."""


def _factor(held: Any) -> Any:
    if isinstance(held, StructuredLinear):
        return Factors(held.kind, held.factors)
    return held if isinstance(held, Tensor) else held.weight


@cache
def kinds() -> dict[str, type[StructuredLinear]]:
    """Return every storage kind, by its name in table entries."""
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
    """Yield a table entry and all entries nested in it."""
    yield entry
    for value in entry.values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                yield from with_nested(each)
