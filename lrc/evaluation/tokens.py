"""Compute losses and divergences token by token, from logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK_BYTES = 2**28  # of the float32 copy for the softmax


def token_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the nats (windows, n - 1), float32, of tokens 2..n; logits (windows, n, vocab), ids (windows, n)."""
    ids = ids.to(logits.device)
    nll = torch.empty(len(ids), ids.shape[1] - 1, device=logits.device)
    for window, rows in _chunks(logits):
        scored = logits[window, rows].float()
        nll[window, rows] = F.cross_entropy(scored, ids[window, 1:][rows], reduction="none")
    return nll


class Divergence(NamedTuple):
    """Hold the comparison of a model with a reference on tokens 2..n of windows, each (windows, n - 1).

    ``nll`` of the model, ``nll_against`` of the reference and ``kl`` = KL(reference ‖ model) are in nats, float32.
    ``agree`` (bool) tells whether both have the same most likely token.
    """

    nll: Tensor
    nll_against: Tensor
    kl: Tensor
    agree: Tensor


def divergence(logits: Tensor, against: Tensor, ids: Tensor) -> Divergence:
    """Compare two models' logits (windows, n, vocab) on ids (windows, n); ``against`` is the reference.

    KL(p‖q) = Σ p (log p − log q), with p of the reference, is computed from a float32 softmax and summed in float64. It
    is infinite where the model gives a token probability 0 and the reference does not.
    """
    ids = ids.to(logits.device)
    shape = len(ids), ids.shape[1] - 1
    nll, nll_against, kl = (torch.empty(shape, device=logits.device) for _ in range(3))
    agree = torch.empty(shape, dtype=torch.bool, device=logits.device)
    for window, rows in _chunks(logits):
        targets = ids[window, 1:][rows, None]
        q = logits[window, rows].float().log_softmax(-1)
        p = against[window, rows].to(logits.device).float().log_softmax(-1)
        nll[window, rows] = -q.gather(-1, targets)[:, 0]
        nll_against[window, rows] = -p.gather(-1, targets)[:, 0]
        agree[window, rows] = q.argmax(-1) == p.argmax(-1)
        weights = p.exp()
        # A token with p = 0 adds nothing, though its logarithms may be infinite.
        terms = (p - q).masked_fill_(weights == 0, 0.0).mul_(weights)
        kl[window, rows] = terms.sum(-1, dtype=torch.float64).float()
    return Divergence(nll, nll_against, kl, agree)


def _chunks(logits: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield window indices and row slices of logits (windows, n, vocab), small enough for float32 copies.

    The last row of a window is left out: its target lies outside the window.
    """
    step = max(_CHUNK_BYTES // (4 * logits.shape[-1]), 1)
    scored = logits.shape[1] - 1
    for window in range(len(logits)):
        yield from ((window, slice(start, min(start + step, scored))) for start in range(0, scored, step))
