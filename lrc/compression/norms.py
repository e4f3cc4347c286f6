"""Count the tokens whose norm in the residual stream changes by much, and warn of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import TypeAdapter
from torch import Tensor

_MANY = 0.05  # tokens


@dataclass(frozen=True)
class StreamNorms:
    """Count tokens with less than half or more than twice the original's norm in the residual stream after a layer.

    A few tokens, often the first of a text, have norms far above all others, and later layers attend to them (massive
    activations, arXiv:2402.17762). So first tokens of a block also count apart. The tokens are those of the held-out
    blocks; of all blocks if there is only one.
    """

    layer: int
    tokens: int
    changed: int
    first_tokens: int
    changed_first_tokens: int

    @property
    def share(self) -> float:
        """The share of tokens that changed, or that of first tokens if it is larger and more than one has changed."""
        first = self.changed_first_tokens / self.first_tokens if self.changed_first_tokens > 1 else 0.0
        return max(self.changed / self.tokens, first)

    @property
    def text(self) -> str:
        """The counts in words."""
        return (
            f"after layer {self.layer}, {self.changed:,} of {self.tokens:,} tokens ({self.changed_first_tokens:,} of "
            f"{self.first_tokens:,} first tokens of a block) have less than half or more than twice the original's "
            "norm in the residual stream"
        )


NORMS = TypeAdapter(list[StreamNorms])  # read back from JSON values


def changed_norms(stream: Tensor, original: Tensor) -> Tensor:
    """Count in streams (blocks, tokens, width) the tokens and those with a changed norm, then both of first tokens."""
    norms, before = (each.float().norm(dim=-1) for each in (stream, original))
    changed = (norms < before / 2) | (norms > 2 * before)
    each = torch.ones_like(changed)
    return torch.stack([part.sum() for part in (each, changed, each[:, 0], changed[:, 0])])


def norm_warnings(norms: Sequence[StreamNorms]) -> list[str]:
    """Return a warning about the first layer after which the norms of more than one token in twenty have changed."""
    start = next((each for each in norms if each.share > _MANY), None)
    if start is None:
        return []
    return [
        f"{start.text}, so that later layers may attend to other tokens; keep more in this layer or before it"
    ]
