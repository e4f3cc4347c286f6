"""Speed up inference: merge projections of one input into one product, and run norms as one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lrc.families import Family, family_of
from lrc.modules.attention import ReducedAttention, run_stock, run_whole
from lrc.modules.fused.norm import FusedRMSNorm, fuse_norm, unfuse_norm
from lrc.modules.fused.shared_input import SharesInput, mergeable


class GatedMLP(SharesInput):
    """Class that replaces a family's own on its gated MLP; the module's attributes stay."""

    family: Family
    stock: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(_mlp_names(self.family), x)
        hidden = getattr(self, self.family.activation)(gate) * up
        return getattr(self, _mlp_name(self.family, self.family.mlp_output))(hidden)

    def run_stock(self: Any) -> None:
        """Restore the family's class."""
        self.__class__ = self.stock
        del self.family, self.stock


def fuse(model: nn.Module, *, batched: bool = True) -> int:
    """Merge q with k and v, and gate with up, for inference; return the number of merged products.

    RMS norms become one kernel each. Weights, names and saved files do not change: parameters become views into the
    merged matrices. A module with gradients, an adapter, a hook or a replaced weight runs its projections one by one.
    Copies of the model are not merged. ``batched``: second factors of one shape also run as one product. Raises
    UserError for an unsupported family.
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
    """Undo ``fuse``: every projection runs separately and has its own memory."""
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
    """Merge q, k and v; tell whether that saved products (an attention that stores them fused saves none)."""
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
    """Fuse every norm of the class that layers have before their MLP."""
    if family.norm_epsilon is None:
        return
    norm = f".{family.half('mlp').norm}"
    norms = {type(module) for path, module in modules if path.endswith(norm)} - {FusedRMSNorm}
    for _, module in modules:
        # An adapter may have wrapped or replaced a norm.
        if type(module) in norms and family.norm_epsilon in vars(module):
            fuse_norm(module, family.norm_epsilon)


def _mlp_names(family: Family) -> list[str]:
    return [_mlp_name(family, role) for role in family.mlp_inputs]


def _mlp_name(family: Family, role: str) -> str:
    return family.projections[role].module.removeprefix(f"{family.mlp}.")
