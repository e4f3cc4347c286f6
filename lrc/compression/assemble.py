"""Put solutions into a decoder layer: its module, table entries and tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrc.families import Architecture, canonical
from lrc.methods.contract import Affine, Factors, Solution
from lrc.modules import Entry, kind_of, kinds
from lrc.modules.table import DENSE, MLP, Table, apply_table, attention_entry


@dataclass(frozen=True)
class ReducedLayer:
    """A layer on the meta device, with its table entries and tensors by path inside the layer.

    ``paths``: the paths of the replaced projections, by role.
    """

    module: nn.Module
    table: Table
    state: dict[str, Tensor]
    paths: dict[str, str]


def assemble(
    architecture: Architecture,
    skeleton: nn.Module,
    state: Mapping[str, Tensor],
    solutions: Iterable[Solution],
    plain: Iterable[str] = (),
) -> ReducedLayer:
    """Replace the solved projections of a layer; weight and bias of each keep their precision.

    Roles in ``plain`` without a solution become ordinary linears.
    """
    family, solutions = architecture.family, list(solutions)
    parts: dict[str, Affine | Factors] = {
        r: Affine(*canonical(family, architecture, state, r)) for r in plain
    }
    parts |= {role: part for solution in solutions for role, part in solution.parts.items()}
    columns = next((s.rotary_columns for s in solutions if s.rotary_columns is not None), None)
    split = _must_split(architecture, parts)
    apart = [role for home in split for role in family.splits[home]]
    parts = {role: Affine(*canonical(family, architecture, state, role)) for role in apart} | parts
    replaced = tuple(f"{family.projections[role].module}." for role in parts)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(replaced)}
    table: Table = {}
    if family.split_mlp and family.mlp in split:
        table[family.mlp] = {"kind": MLP}
    if family.attention in split:
        qk, v = (_shape(parts[role])[0] // architecture.kv_heads for role in ("k", "v"))
        if qk == architecture.head_dim:
            columns = None  # nothing was dropped
        table[family.attention] = attention_entry(qk, v, columns is not None)
        if columns is not None:
            kept[f"{family.attention}.rotary_columns"] = columns
    paths = {role: family.path(role, split) for role in parts}
    for role, part in parts.items():
        weight, bias = canonical(family, architecture, state, role)
        table[paths[role]], tensors = store(part, weight.dtype, None if bias is None else bias.dtype)
        kept |= {f"{paths[role]}.{name}": tensor for name, tensor in tensors.items()}
    module = copy.deepcopy(skeleton)
    apply_table(module, table, family)
    # Empty tensors under the old names, so that loading without lrc fails.
    guards = [name for name, t in module.state_dict().items() if t.numel() == 0 and name not in kept]
    kept |= {name: torch.empty(0, dtype=state[name].dtype) for name in guards}
    return ReducedLayer(module, table, kept, paths)


def _must_split(architecture: Architecture, parts: Mapping[str, Affine | Factors]) -> list[str]:
    """Return the modules that must store projections apart: one that is touched is fused, or a head size changes."""
    shapes, family = architecture.matrices, architecture.family
    return [
        home
        for home, roles in family.splits.items()
        if any(
            family.projections[role].fused
            or (home == family.attention and _shape(parts[role]) != (shapes[role].rows, shapes[role].columns))
            for role in roles
            if role in parts
        )
    ]


def _shape(part: Affine | Factors) -> tuple[int, int]:
    if isinstance(part, Affine):
        return part.weight.shape[0], part.weight.shape[1]
    entry = kinds()[part.kind].entry(part.tensors, part.bias is not None)
    return entry["out"], entry["in"]


def store(
    part: Affine | Factors, dtype: torch.dtype, bias_dtype: torch.dtype | None = None
) -> tuple[Entry, dict[str, Tensor]]:
    """Return a part's table entry and its module's tensors by name, rounded; a bias to ``bias_dtype`` if given."""
    bias = None if part.bias is None else part.bias.to(bias_dtype or dtype)
    if isinstance(part, Affine):
        rows, columns = part.weight.shape
        entry = {"kind": DENSE, "in": columns, "out": rows, "bias": bias is not None}
        return entry, {"weight": part.weight.to(dtype), **({} if bias is None else {"bias": bias})}
    kind, tensors = kinds()[part.kind], part.to(dtype).tensors
    entry = kind.entry(tensors, bias is not None)
    with torch.device("meta"):
        module = kind.from_entry(entry)
    module.load_factors(tensors, bias)
    return entry, {name: tensor.detach() for name, tensor in module.state_dict().items()}


def restore(entry: Entry, tensors: Mapping[str, Tensor]) -> Affine | Factors:
    """Return the part that ``store`` was given, as rounded: the inverse of ``store``."""
    if entry["kind"] == DENSE:
        return Affine(tensors["weight"], tensors.get("bias"))
    with torch.device("meta"):
        module = kind_of(entry).from_entry(entry)
    module.load_state_dict(dict(tensors), assign=True)
    module.requires_grad_(False)
    return Factors(entry["kind"], module.factors, module.offset)
