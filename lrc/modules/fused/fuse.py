"""Makes a model faster to run: projections of one input become one product, and norms one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lrc.families import Family, family_of
from lrc.modules.attention import ReducedAttention, run_stock, run_whole
from lrc.modules.fused.norm import FusedRMSNorm, fuse_norm, unfuse_norm
from lrc.modules.fused.shared_input import SharesInput, mergeable


class GatedMLP(SharesInput):
    """Stands in for a family's gated MLP, whose modules and attributes it has."""

    family: Family
    stock: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(_mlp_names(self.family), x)
        hidden = getattr(self, self.family.activation)(gate) * up
        return getattr(self, _mlp_name(self.family, self.family.mlp_output))(hidden)

    def run_stock(self: Any) -> None:
        """Be the family's own again."""
        self.__class__ = self.stock
        del self.family, self.stock


def fuse(model: nn.Module, *, batched: bool = True) -> int:
    """Merge, for inference, queries with keys and values and the gate with its partner; how many products came of it.

    Root-mean-square norms become one kernel each. The weights, their names and what is saved stay as they are:
    parameters become views into the merged matrices. With gradients, an adapter, a hook or another weight on one of
    them a module runs them one by one, as before. Copies of the model are not merged. ``batched``: second factors of
    one shape run as one product too. Raises UserError for a model of a family that lrc does not know.
    """
    config: Any = model.config
    family, count = family_of(config.model_type), 0
    modules = list(model.named_modules())
    for path, module in modules:
        if path.endswith(f".{family.attention}"):
            count += _fuse_attention(module, family, batched)
        elif path.endswith(f".{family.mlp}") and len(family.mlp_inputs) > 1:
            count += _fuse_mlp(module, family, batched)
    _fuse_norms(modules, family)
    return count


def unfuse(model: nn.Module) -> None:
    """Run every projection by itself again, each with memory of its own, and norms as the family does."""
    for module in list(model.modules()):
        if isinstance(module, FusedRMSNorm):
            unfuse_norm(module)
        if not isinstance(module, SharesInput) or module.shared is None:
            continue
        for name in module.shared.names:
            for parameter in getattr(module, name).parameters():
                parameter.data = parameter.data.clone()
        module.shared = None
        if isinstance(module, GatedMLP):
            module.run_stock()
        elif isinstance(module, ReducedAttention) and module.stock:
            run_stock(module)


def _fuse_attention(module: Any, family: Family, batched: bool) -> bool:
    """Whether products were saved; an attention that stores them as one product has none to save."""
    reduced = isinstance(module, ReducedAttention)
    if not reduced and any(family.projections[role].fused for role in family.split):
        return False
    names = [family.split[role] for role in ("q", "k", "v")]
    if not mergeable(module, names):
        return False
    if not reduced:
        run_whole(module, family)
    return module.merge(names, batched=batched)


def _fuse_mlp(module: Any, family: Family, batched: bool) -> bool:
    names = _mlp_names(family)
    if not mergeable(module, names):
        return False
    if not isinstance(module, GatedMLP):
        stock = type(module)
        module.__class__ = GatedMLP
        module.family, module.stock = family, stock
    return module.merge(names, batched=batched)


def _fuse_norms(modules: Sequence[tuple[str, nn.Module]], family: Family) -> None:
    """Every norm of the class that layers have before their MLP, that of the attention and the last one too."""
    if family.norm_epsilon is None:
        return
    norm = f".{family.half('mlp').norm}"
    norms = {type(module) for path, module in modules if path.endswith(norm)} - {FusedRMSNorm}
    for _, module in modules:
        # An adapter may have put a module of its own around or in the place of a norm.
        if type(module) in norms and family.norm_epsilon in vars(module):
            fuse_norm(module, family.norm_epsilon)


def _mlp_names(family: Family) -> list[str]:
    return [_mlp_name(family, role) for role in family.mlp_inputs]


def _mlp_name(family: Family, role: str) -> str:
    return family.projections[role].module.removeprefix(f"{family.mlp}.")
