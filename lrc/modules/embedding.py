"""A factorized table of token embeddings: a narrow table to look up, then a linear map to the hidden width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from lrc.modules.kind import Entry

EMBEDDING = "embedding"
FACTORS = ("A.weight", "B.weight")


class FactorizedEmbedding(nn.Module):
    """Rows of B A for ``B`` (tokens, rank) and ``A`` (rank, width), the factors of a head with the same weight.

    A head tied to it is a ``low_rank`` linear with these very tensors. The zero-element buffer ``weight`` stops a load
    without lrc, as that of a ``StructuredLinear`` does.
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
        """Make an uninitialised module of the shapes in a table entry, on the ambient device and dtype."""
        return cls(entry["tokens"], entry["width"], entry["rank"])


class Widening(nn.Module):
    """x ↦ x A; not an ``nn.Linear``, which would hold Aᵀ, as a tied head reads A the other way."""

    def __init__(self, rank: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rank, width))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def embedding_entry(tokens: int, width: int, rank: int) -> Entry:
    """The table entry of a factorized embedding."""
    return {"kind": EMBEDDING, "tokens": tokens, "width": width, "rank": rank}
