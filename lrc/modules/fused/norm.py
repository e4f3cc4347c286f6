"""Run an RMS norm as one kernel, where transformers launches eight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedRMSNorm(nn.Module):
    """Class that replaces a family's own on its RMS norms; attributes stay (arXiv:1910.07467, equation 4).

    Half precision is rounded once, after the weight, not also before it. With gradients, or if weight and input differ
    in dtype, the family's own forward runs.
    """

    weight: nn.Parameter
    epsilon: float
    stock: type[nn.Module]

    def forward(self, hidden_states: Tensor) -> Tensor:
        if torch.is_grad_enabled() or hidden_states.dtype != self.weight.dtype:
            return self.stock.forward(self, hidden_states)
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.epsilon)


def fuse_norm(module: Any, epsilon: str) -> None:
    """Make a norm run as one kernel; ``epsilon`` names the attribute with the constant added to the mean square."""
    module.epsilon, module.stock = getattr(module, epsilon), type(module)
    module.__class__ = FusedRMSNorm


def unfuse_norm(module: Any) -> None:
    """Undo ``fuse_norm``."""
    module.__class__ = module.stock
    del module.epsilon, module.stock
