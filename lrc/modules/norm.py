"""A root-mean-square norm as one kernel, where transformers takes eight small ones."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class FusedRMSNorm(nn.Module):
    """Stands in for a family's own norm, whose weight and attributes it has (arXiv:1910.07467, equation 4).

    The norm is taken in float32 whatever comes in, and rounded once, behind the weight, not before it too.
    """

    weight: nn.Parameter
    epsilon: float
    stock: type[nn.Module]

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype:  # the kernel wants one
            return self.stock.forward(self, hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.epsilon)


def fuse_norm(module: Any, epsilon: str) -> None:
    """Have a stock norm run as one kernel; ``epsilon`` is the attribute that holds what is added to the mean square."""
    module.epsilon, module.stock = getattr(module, epsilon), type(module)
    module.__class__ = FusedRMSNorm


def unfuse_norm(module: Any) -> None:
    """Undo ``fuse_norm``."""
    module.__class__ = module.stock
    del module.epsilon, module.stock
