"""Compute the loss of a language model in nats from its logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK_BYTES = 2**28  # of the float32 copy for the softmax


def token_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the nats (windows, n - 1), float32, of tokens 2..n; logits (windows, n, vocab), ids (windows, n)."""
    ids = ids.to(logits.device)
    nll = torch.empty(len(ids), ids.shape[1] - 1, device=logits.device)
    for window, rows in chunks(logits):
        scored = logits[window, rows].float()
        nll[window, rows] = F.cross_entropy(scored, ids[window, 1:][rows], reduction="none")
    return nll


def chunks(logits: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield window indices and row slices of logits (windows, n, vocab), small enough for float32 copies.

    The last row of a window is left out: its target lies outside the window.
    """
    step = max(_CHUNK_BYTES // (4 * logits.shape[-1]), 1)
    scored = logits.shape[1] - 1
    for window in range(len(logits)):
        yield from ((window, slice(start, min(start + step, scored))) for start in range(0, scored, step))
