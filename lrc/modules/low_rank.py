"""A pair of thin matrices: y = B (A x) + b."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from lrc.modules.kind import Entry, Held, StructuredLinear


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
