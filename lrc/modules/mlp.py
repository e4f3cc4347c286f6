"""Run an MLP whose input projections are stored separately, and any family's MLP in a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lrc.errors import UserError
from lrc.families import Family
from lrc.modules.absent import Absent
from lrc.modules.fused.merged import MergesProjections


class GatedMLP(MergesProjections):
    """Class that replaces a family's own on its gated MLP; the module's attributes stay."""

    family: Family
    stock: type[nn.Module]

    def forward(self, hidden_states: Tensor) -> Tensor:
        *inputs, output = self.family.mlp_names
        gate, up = self.project(inputs, hidden_states)
        return getattr(self, output)(getattr(self, self.family.activation)(gate) * up)


def gate_mlp(module: Any, family: Family) -> None:
    """Make a gated MLP with unfused projections run ``GatedMLP.forward``."""
    stock = type(module)
    module.__class__ = GatedMLP
    module.family, module.stock = family, stock


def split_mlp(module: Any, family: Family) -> None:
    """Turn a family's MLP with fused projections into its unfused form in place; projections are replaced separately.

    Raises UserError if the family does not fuse them.
    """
    if not family.split_mlp:
        raise UserError(f"an MLP entry splits projections that {family.model_type} does not fuse")
    names = sorted(family.split_mlp.values())
    for name in {family.projections[role].module.removeprefix(f"{family.mlp}.") for role in family.split_mlp}:
        setattr(module, name, Absent(getattr(module, name).weight, names))
    gate_mlp(module, family)


def run_mlp(layer: nn.Module, family: Family, x: Tensor) -> Tensor:
    """Return the output of a decoder layer's MLP for its normed input x (..., hidden), before any dropout."""
    if family.mlp:
        return layer.get_submodule(family.mlp)(x)
    (read,), output = family.mlp_inputs, family.mlp_output
    hidden = layer.get_submodule(family.activation)(layer.get_submodule(family.projections[read].module)(x))
    return layer.get_submodule(family.projections[output].module)(hidden)
