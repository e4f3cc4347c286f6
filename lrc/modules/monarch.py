"""A grid of low-rank blocks, run as two block-diagonal products and a permutation (arXiv:2204.00595)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lrc.modules.kind import Entry, Held, StructuredLinear


class MonarchLinear(StructuredLinear):
    """y_j = Σ_k L_jk (R_jk x_k) + b_j over ``blocks`` groups of inputs k and of outputs j.

    ``R`` (blocks, blocks·rank, in/blocks) stacks the right factors of all output groups for each input group. ``L``
    (blocks, out/blocks, blocks·rank) holds the left factors of all input groups for each output group.
    """

    kind = "monarch"
    factor_names = ("L", "R")
    tiny: ClassVar = {"in": 12, "out": 20, "blocks": 4, "rank": 2}
    steps = 3

    def __init__(self, in_features: int, out_features: int, blocks: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.blocks, self.rank = in_features, out_features, blocks, rank
        self.R = nn.Parameter(torch.empty(blocks, blocks * rank, in_features // blocks))
        self.L = nn.Parameter(torch.empty(blocks, out_features // blocks, blocks * rank))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(-1, self.blocks, x.shape[-1] // self.blocks).transpose(0, 1)
        inner = groups @ self.R.transpose(1, 2)  # (k, tokens, j·rank)
        by_output = inner.unflatten(2, (self.blocks, self.rank)).permute(2, 1, 0, 3)
        swapped = by_output.flatten(2)  # (j, tokens, k·rank)
        y = (swapped @ self.L.transpose(1, 2)).transpose(0, 1).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"blocks={self.blocks}, rank={self.rank}, bias={self.bias is not None}"
        )

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Self:
        return cls(entry["in"], entry["out"], entry["blocks"], entry["rank"], entry["bias"])

    @classmethod
    def entry(cls, factors: Held, bias: bool) -> Entry:
        blocks, stacked, columns = factors["R"].shape
        return {
            "kind": cls.kind,
            "in": blocks * columns,
            "out": blocks * factors["L"].shape[1],
            "blocks": blocks,
            "rank": stacked // blocks,
            "bias": bias,
        }

    def load_factors(self, factors: Held, bias: Tensor | None) -> None:
        self.L, self.R = nn.Parameter(factors["L"]), nn.Parameter(factors["R"])
        self.weight = factors["L"].new_empty(0)
        if bias is not None:
            self.bias = nn.Parameter(bias)

    @staticmethod
    def dense(factors: Held) -> Tensor:
        blocks = factors["R"].shape[0]
        left = factors["L"].unflatten(2, (blocks, -1))  # (j, s, k, rank)
        right = factors["R"].unflatten(1, (blocks, -1))  # (k, j, rank, p)
        return torch.einsum("jskr,kjrp->jskp", left, right).flatten(2).flatten(0, 1)

    @staticmethod
    def parameter_count(entry: Mapping[str, Any]) -> int:
        return entry["rank"] * entry["blocks"] * (entry["in"] + entry["out"])

    @property
    def output_linear(self) -> None:
        return None
