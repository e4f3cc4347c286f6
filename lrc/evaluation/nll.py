"""The loss of a language model in nats, from its logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK_BYTES = 2**28  # of the float32 copy that the softmax works on


def token_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Nats of tokens 2..n of windows, (windows,) float64; logits (windows, n, vocab), ids (windows, n)."""
    ids = ids.to(logits.device)
    rows = max(_CHUNK_BYTES // (4 * logits.shape[-1]), 1)
    sums = []
    for window, targets in zip(logits[:, :-1], ids[:, 1:], strict=True):
        pieces = zip(window.split(rows), targets.split(rows), strict=True)
        losses = [F.cross_entropy(piece.float(), wanted, reduction="none") for piece, wanted in pieces]
        sums.append(torch.cat(losses).double().sum())
    return torch.stack(sums)
