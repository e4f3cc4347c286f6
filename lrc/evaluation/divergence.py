"""What a model's next-token distributions lose of another's, token by token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrc.evaluation.nll import chunks


class Divergence(NamedTuple):
    """Tokens 2..n of windows, each (windows, n - 1): ``nll`` of a model and ``nll_against`` of the one it is held
    against, in nats, float32; ``kl`` of the latter's distribution from the former's, in nats, float32; ``agree``, bool:
    whether both think the same token the likeliest.
    """

    nll: Tensor
    nll_against: Tensor
    kl: Tensor
    agree: Tensor


def divergence(logits: Tensor, against: Tensor, ids: Tensor) -> Divergence:
    """What it comes to for tokens 2..n of windows from both models' logits (windows, n, vocab) and ids (windows, n).

    kl is KL(p‖q) = Σ p (log p − log q), p being of ``against``, from a float32 softmax and summed in float64. It is
    infinite where the model rules out what the other does not.
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
        # What p rules out adds nothing, though the logarithms may have no finite value.
        terms = (p - q).masked_fill_(weights == 0, 0.0).mul_(weights)
        kl[window, rows] = terms.sum(-1, dtype=torch.float64).float()
    return Divergence(nll, nll_against, kl, agree)
