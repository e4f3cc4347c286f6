"""Speed up inference: merge projections of one input into one product, and run norms as one kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrc.families import Family, family_of
from lrc.modules.attention import ReducedAttention, set_class
from lrc.modules.fused.merged import MergesProjections, mergeable
from lrc.modules.mlp import GatedMLP, gate_mlp


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


def fuse(model: nn.Module) -> int:
    """Merge q with k and v, and gate with up, for inference; return the number of merged products.

    RMS norms become one kernel each. Weights, names and saved files do not change: parameters become views into the
    merged matrices. A module with gradients, an adapter, a hook or a replaced weight runs its projections one by one.
    Second factors of one shape run as one product too. Copies of the model are not merged. Raises UserError for an
    unsupported family.
    """
    config: Any = model.config
    family, count = family_of(config.model_type), 0
    modules = list(model.named_modules())
    for path, module in modules:
        if path.endswith(f".{family.attention}"):
            count += _fuse_attention(module, family)
        elif len(family.mlp_inputs) > 1 and path.endswith(f".{family.mlp}"):
            count += _fuse_mlp(module, family)
    mlp = family.half("mlp")
    if family.norm_epsilon is None or family.norm_offset:
        return count
    norm = f".{mlp.norm or mlp.post_norm}"
    norms = {type(module) for path, module in modules if path.endswith(norm)} - {FusedRMSNorm}
    for _, module in modules:
        # An adapter may have wrapped or replaced a norm.
        if type(module) in norms and family.norm_epsilon in vars(module):
            fuse_norm(module, family.norm_epsilon)
    return count


def unfuse(model: nn.Module) -> None:
    """Undo ``fuse``: every projection runs separately and has its own memory."""
    for module in list(model.modules()):
        if isinstance(module, FusedRMSNorm):
            unfuse_norm(module)
        if not isinstance(module, MergesProjections) or module.merged is None:
            continue
        for name in module.merged.names:
            for parameter in getattr(module, name).parameters():
                parameter.data = parameter.data.clone()
        module.merged = None
        if isinstance(module, GatedMLP) and not module.family.split_mlp:
            module.__class__ = module.stock  # type: ignore[assignment]
            del module.family, module.stock
        elif isinstance(module, ReducedAttention) and module.stock:
            module.__class__ = module.base  # type: ignore[assignment]
            del module.rotary_columns, module.qk_dim, module.v_dim, module.stock


def _fuse_attention(module: Any, family: Family) -> bool:
    """Merge q, k and v; tell whether that saved products (an attention that stores them fused saves none)."""
    reduced = isinstance(module, ReducedAttention)
    if not reduced and any(family.projections[role].fused for role in family.split):
        return False
    names = [family.split[role] for role in ("q", "k", "v")]
    if not mergeable(module, names):
        return False
    if not reduced:
        set_class(module, family, module.head_dim, module.head_dim, None)
        module.stock = True
    return module.merge(names)


def _fuse_mlp(module: Any, family: Family) -> bool:
    """Merge gate and up; tell whether that saved products (an MLP that stores them fused saves none)."""
    split = isinstance(module, GatedMLP)
    names = family.mlp_names[:-1]
    if (family.split_mlp and not split) or not mergeable(module, names):
        return False
    if not split:
        gate_mlp(module, family)
    return module.merge(names)


def fuse_norm(module: Any, epsilon: str) -> None:
    """Make a norm run as one kernel; ``epsilon`` names the attribute with the constant added to the mean square."""
    module.epsilon, module.stock = getattr(module, epsilon), type(module)
    module.__class__ = FusedRMSNorm


def unfuse_norm(module: Any) -> None:
    """Undo ``fuse_norm``."""
    module.__class__ = module.stock
    del module.epsilon, module.stock
