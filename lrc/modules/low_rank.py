"""A pair of thin matrices, as a linear map y = B (A x) + b or as a table of token embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrc.modules.kind import Entry, Guarded, Held, StructuredLinear
from lrc.modules.product import extended

EMBEDDING = "embedding"
FACTORS = ("A.weight", "B.weight")


class Pair(Guarded):
    """A matrix B A, for ``B`` (rows, rank) and ``A`` (rank, columns); a merged adapter raises the rank."""

    rank: int
    A: Any
    B: Any

    def merge(self, value: Tensor) -> None:
        entry = self.listed[1] if self.listed else {}  # empty where both factors are tied to another module's
        grown = extended(self.B.weight.detach(), self.A.weight.detach(), value) if entry else None
        if grown is None:
            raise self.refusal()
        for factor, weight in zip((self.B, self.A), grown, strict=True):
            factor.weight = nn.Parameter(weight, requires_grad=factor.weight.requires_grad)
        self.rank = entry["rank"] = len(grown[1])


class Factor(nn.Module):
    """x ↦ W x + b; not an ``nn.Linear``, which adapters would find beside the pair that it belongs to."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @property
    def out_features(self) -> int:
        return len(self.weight)


class LowRankLinear(Pair, StructuredLinear):
    """A pair of linear maps, ``A`` (rank, in) and ``B`` (out, rank)."""

    kind = "low_rank"
    factor_names = ("A", "B")
    tiny: ClassVar = {"in": 12, "out": 20, "rank": 5}

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.A = Factor(in_features, rank, bias=False)
        self.B = Factor(rank, out_features, bias=bias)

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
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.B.bias

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "bias":
            self.B.bias = value
        else:
            super().__setattr__(name, value)

    @property
    def output_linear(self) -> nn.Module:
        return self.B


class FactorizedEmbedding(Pair, nn.Embedding):
    """Embedding whose table is B A, for ``B`` (tokens, rank) and ``A`` (rank, width).

    A tied head is a ``low_rank`` linear that shares both tensors. ``factor`` multiplies what the table gives.
    """

    padding_idx = max_norm = None
    norm_type, scale_grad_by_freq, sparse = 2.0, False, False

    def __init__(self, tokens: int, width: int, rank: int, factor: float = 1.0) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = tokens, width, rank
        widening = Widening(rank, width, factor)
        self.B, self.A = Rows(tokens, rank, widening), widening

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.num_embeddings, self.embedding_dim

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        b, a = (f.weight.detach().to(dtype or f.weight.dtype) for f in (self.B, self.A))
        return b @ a

    def forward(self, ids: Tensor) -> Tensor:
        return self.B(ids)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Self:
        """Make an uninitialised module with the shapes of a table entry, on the default device and dtype."""
        return cls(entry["tokens"], entry["width"], entry["rank"], entry.get("factor", 1.0))


class Rows(nn.Module):
    """Rows of a factorized table, widened: PEFT takes the module with a row for each token as the embedding."""

    def __init__(self, tokens: int, rank: int, widening: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, rank))
        vars(self)["widen"] = widening  # a module of the embedding, not of this one

    def forward(self, ids: Tensor) -> Tensor:
        return vars(self)["widen"](F.embedding(ids, self.weight))


class Widening(nn.Module):
    """x ↦ factor · x A; not an ``nn.Linear``, which would store Aᵀ, while the tied head needs A."""

    def __init__(self, rank: int, width: int, factor: float) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.empty(rank, width)), factor

    def forward(self, x: Tensor) -> Tensor:
        found = x @ self.weight
        # Rounded to the precision of the table, as transformers rounds it.
        return found if self.factor == 1 else found * torch.tensor(self.factor).to(found.dtype).item()
