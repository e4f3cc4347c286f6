"""Run a factorized embedding: look up a row of a narrow table, then map it to the hidden width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from lrc.modules.kind import Entry

EMBEDDING = "embedding"
FACTORS = ("A.weight", "B.weight")


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


def embedding_entry(tokens: int, width: int, rank: int) -> Entry:
    """Return the table entry of a factorized embedding."""
    return {"kind": EMBEDDING, "tokens": tokens, "width": width, "rank": rank}
