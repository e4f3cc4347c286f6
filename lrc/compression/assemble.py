"""Puts solutions into a decoder layer: the module that runs them, its table entries and its tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrc.families import Architecture, canonical
from lrc.families.family import ATTENTION_ROLES
from lrc.methods.contract import Affine, Factors, Solution
from lrc.modules import Entry, kind_of, kinds
from lrc.modules.table import DENSE, Table, apply_table, attention_entry, dense_entry


@dataclass(frozen=True)
class ReducedLayer:
    """A layer on the meta device, the table that shaped it and its tensors, both by path inside the layer.

    ``paths``: where the projections that were replaced now are, by role.
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
    dtype: torch.dtype,
    plain: Iterable[str] = (),
) -> ReducedLayer:
    """Replace in a layer what the solutions solve; new tensors are rounded to ``dtype``, the checkpoint's precision.

    Roles in ``plain`` that no solution holds are stored as an ordinary linear all the same.
    """
    family, solutions = architecture.family, list(solutions)
    parts: dict[str, Affine | Factors] = {
        r: Affine(*canonical(family, architecture, state, r)) for r in plain
    }
    parts |= {role: part for solution in solutions for role, part in solution.parts.items()}
    columns = next((s.rotary_columns for s in solutions if s.rotary_columns is not None), None)
    split = _must_split(architecture, parts)
    if split:
        parts = {r: Affine(*canonical(family, architecture, state, r)) for r in ATTENTION_ROLES} | parts
    replaced = tuple(f"{family.projections[role].module}." for role in parts)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(replaced)}
    table: Table = {}
    if split:
        qk, v = (_shape(parts[role])[0] // architecture.kv_heads for role in ("k", "v"))
        if qk == architecture.head_dim:
            columns = None  # all of them, in their own order
        table[family.attention] = attention_entry(qk, v, columns is not None)
        if columns is not None:
            kept[f"{family.attention}.rotary_columns"] = columns
    paths = {role: family.split_module(role) if split else family.projections[role].module for role in parts}
    for role, part in parts.items():
        table[paths[role]], tensors = store(part, dtype)
        kept |= {f"{paths[role]}.{name}": tensor for name, tensor in tensors.items()}
    module = copy.deepcopy(skeleton)
    apply_table(module, table, family)
    # Zero-element tensors mark what is no longer there, so that a load without lrc stops at them.
    guards = {name: t for name, t in module.state_dict().items() if t.numel() == 0 and name not in kept}
    kept |= {name: torch.empty(0, dtype=dtype) for name in guards}
    return ReducedLayer(module, table, kept, paths)


def _must_split(architecture: Architecture, parts: Mapping[str, Affine | Factors]) -> bool:
    """Whether the attention must be stored as four separate projections: some change of head size, or a fused one."""
    touched = [role for role in ATTENTION_ROLES if role in parts]
    shapes, fused = architecture.matrices, architecture.family.projections
    return any(
        fused[role].fused or _shape(parts[role]) != (shapes[role].rows, shapes[role].columns)
        for role in touched
    )


def _shape(part: Affine | Factors) -> tuple[int, int]:
    if isinstance(part, Affine):
        return part.weight.shape[0], part.weight.shape[1]
    entry = kinds()[part.kind].entry(part.tensors, part.bias is not None)
    return entry["out"], entry["in"]


def store(part: Affine | Factors, dtype: torch.dtype) -> tuple[Entry, dict[str, Tensor]]:
    """The table entry of a part and the tensors of its module by name."""
    if isinstance(part, Affine):
        bias, (rows, columns) = None if part.bias is None else part.bias.to(dtype), part.weight.shape
        tensors = {"weight": part.weight.to(dtype)} | ({} if bias is None else {"bias": bias})
        return dense_entry(rows, columns, bias is not None), tensors
    kind, part = kinds()[part.kind], part.to(dtype)
    entry = kind.entry(part.tensors, part.bias is not None)
    with torch.device("meta"):
        module = kind.from_entry(entry)
    module.load_factors(part.tensors, part.bias)
    return entry, {name: tensor.detach() for name, tensor in module.state_dict().items()}


def restore(entry: Entry, tensors: Mapping[str, Tensor]) -> Affine | Factors:
    """The part of a table entry and the tensors of its module by name: what ``store`` was given, as it was rounded."""
    if entry["kind"] == DENSE:
        return Affine(tensors["weight"], tensors.get("bias"))
    with torch.device("meta"):
        module = kind_of(entry).from_entry(entry)
    module.load_state_dict(dict(tensors), assign=True)
    module.requires_grad_(False)
    return Factors(entry["kind"], module.factors, module.offset)
