"""Compare the next-token distributions of two models, token by token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrc.evaluation.nll import chunks


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
    for window, rows in chunks(logits):
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
