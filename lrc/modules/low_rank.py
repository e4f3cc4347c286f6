"""A pair of thin matrices, as a linear map y = B (A x) + b or as a table of token embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lrc.modules.kind import Entry, Held, StructuredLinear

EMBEDDING = "embedding"
FACTORS = ("A.weight", "B.weight")


class LowRankLinear(StructuredLinear):
    """A pair of ordinary linears, ``A`` (rank, in) and ``B`` (out, rank), that adapters and quantizers find."""

    kind = "low_rank"
    factor_names = ("A", "B")
    tiny: ClassVar = {"in": 12, "out": 20, "rank": 5}

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(x))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Self:
        return cls(entry["in"], entry["out"], entry["rank"], entry["bias"])

    @classmethod
    def entry(cls, factors: Held, bias: bool) -> Entry:
        (rank, columns), rows = factors["A"].shape, factors["B"].shape[0]
        return {"kind": cls.kind, "in": columns, "out": rows, "rank": rank, "bias": bias}

    def load_factors(self, factors: Held, bias: Tensor | None) -> None:
        self.A.weight, self.B.weight = nn.Parameter(factors["A"]), nn.Parameter(factors["B"])
        self.weight = factors["A"].new_empty(0)
        if bias is not None:
            self.B.bias = nn.Parameter(bias)

    @staticmethod
    def dense(factors: Held) -> Tensor:
        return factors["B"] @ factors["A"]

    @staticmethod
    def parameter_count(entry: Mapping[str, Any]) -> int:
        return entry["rank"] * (entry["in"] + entry["out"])

    @property
    def output_linear(self) -> nn.Linear:
        return self.B


class FactorizedEmbedding(nn.Module):
    """Embedding whose table is B A, for ``B`` (tokens, rank) and ``A`` (rank, width).

    A tied head is a ``low_rank`` linear that shares both tensors. The zero-element buffer ``weight`` makes a load
    without lrc fail, as in ``StructuredLinear``.
    """

    weight: Tensor

    def __init__(self, tokens: int, width: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0))
        self.num_embeddings, self.embedding_dim, self.rank = tokens, width, rank
        self.B = nn.Embedding(tokens, rank)
        self.A = Widening(rank, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.A(self.B(ids))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Self:
        """Make an uninitialised module with the shapes of a table entry, on the default device and dtype."""
        return cls(entry["tokens"], entry["width"], entry["rank"])


class Widening(nn.Module):
    """x ↦ x A; not an ``nn.Linear``, which would store Aᵀ, while the tied head needs A."""

    def __init__(self, rank: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rank, width))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight
