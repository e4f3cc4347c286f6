"""Compute the size of every target and of the output checkpoint from headers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lrc.checkpoint.headers import StoredTensor
from lrc.checkpoint.sizes import Size, size_of
from lrc.families import Architecture
from lrc.families.family import ATTENTION_ROLES
from lrc.methods.sizes import SizeValue
from lrc.modules.table import Table, attention_entry
from lrc.plan.job import Job
from lrc.plan.precedence import spans
from lrc.plan.resolved import Assignment, LayerPlan
from lrc.walk.needs import solver_of


@dataclass(frozen=True)
class TargetSize:
    """Hold one target at one size, in all ``layers`` (``0-3, 7``) with these settings; no layers for outer targets.

    ``kept``, ``whole``: weights in each layer.
    """

    target: str
    method: str
    layers: str
    size: SizeValue
    options: dict[str, Any]
    kept: int
    whole: int


def target_sizes(job: Job) -> list[TargetSize]:
    """Return every target of the plan: outer targets, then layers grouped by equal settings, by first layer."""
    groups: dict[str, tuple[Assignment, list[int]]] = {a.target: (a, []) for a in job.plan.outer}
    for layer in job.plan.layers:
        for assignment in layer.assignments:
            groups.setdefault(repr(assignment), (assignment, []))[1].append(layer.index)
    return [
        TargetSize(a.target, a.method, spans(layers), a.size, a.options, a.kept, a.whole)
        for a, layers in groups.values()
    ]


def output_size(job: Job) -> Size:
    """Return the size of the checkpoint that the job will write."""
    reader, family = job.reader, job.reader.family
    tensors, table = dict(reader.tensors), Table()
    for a in job.plan.outer:
        path = family.outer[a.target]
        del tensors[f"{path}.weight"]
        tensors[f"{path}.weights"] = StoredTensor((a.kept,), reader.dtype, reader.folder)
    for layer in job.plan.layers:
        prefix = f"{family.layers}.{layer.index}."
        replaced = _replaced(reader.architecture, layer)
        modules = tuple(f"{prefix}{family.projections[role].module}." for role in replaced)
        tensors = (
            {name: stored for name, stored in tensors.items() if not name.startswith(modules)}
            if modules
            else tensors
        )
        for name, shape, dtype in _new_tensors(reader.architecture, layer, replaced, reader.dtype):
            tensors[prefix + name] = StoredTensor(shape, dtype, reader.folder)
        if replaced >= set(ATTENTION_ROLES):
            widths = {a.target: inner_width(reader.architecture, a) for a in layer.assignments}
            qk, v = (widths.get(name, reader.architecture.head_dim) for name in ("qk", "ov"))
            table[prefix + family.attention] = attention_entry(qk, v, False)
    size = size_of(tensors.values(), reader.architecture, reader.dtype, table)
    targets, beyond = reader.architecture.targets | reader.architecture.outer, 0
    for a in (*job.plan.outer, *(a for layer in job.plan.layers for a in layer.assignments)):
        # kept weights may take other bytes than equally many weights in the checkpoint's precision
        taken = solver_of(a).size.bytes(targets[a.target], a.size, a.options, reader.dtype)
        beyond += taken - a.kept * reader.dtype.itemsize
    return replace(size, bytes=size.bytes + beyond)


def inner_width(architecture: Architecture, assignment: Assignment) -> int:
    """Return the inner dimension that an assignment leaves."""
    target = (architecture.targets | architecture.outer)[assignment.target]
    return solver_of(assignment).size.inner(target, assignment.size)


def _replaced(architecture: Architecture, layer: LayerPlan) -> set[str]:
    """Return the roles whose tensors are replaced; all of attention if it must be stored split."""
    roles = {role for a in layer.assignments for role in architecture.targets[a.target].matrices}
    fused = {role for role in roles if architecture.family.projections[role].fused}
    split = fused or any(a.target in ("qk", "ov") for a in layer.assignments)
    return roles | set(ATTENTION_ROLES) if split else roles


def _new_tensors(
    architecture: Architecture, layer: LayerPlan, replaced: set[str], dtype: torch.dtype
) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Return name, shape and dtype of the tensors of replaced roles; factors are one tensor of the right size."""
    found: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    covered: dict[str, Assignment] = {}
    for a in layer.assignments:
        covered |= dict.fromkeys(architecture.targets[a.target].matrices, a)
        found.append((f"{a.target}.weights", (a.kept,), dtype))
        if a.target == "qk" and architecture.family.rotary != "none":
            found.append(
                ("rotary_columns", (architecture.kv_heads, inner_width(architecture, a)), torch.int64)
            )
    for role in sorted(replaced):
        if role not in covered:
            found.append((f"{role}.weight", (architecture.matrices[role].parameters,), dtype))
        found.append((f"{role}.bias", (_bias(architecture, role, covered.get(role)),), dtype))
    return found


def _bias(architecture: Architecture, role: str, assignment: Assignment | None) -> int:
    """Return the elements of a role's bias; it shrinks with the inner dimension, a value bias moves to the output."""
    matrix, target = architecture.matrices[role], assignment.target if assignment else role
    if target == "ov":
        biased = architecture.matrices["v"].bias or architecture.matrices["o"].bias
        return matrix.rows if role == "o" and biased else 0
    if not matrix.bias:
        return 0
    if target == "qk" and assignment:
        return matrix.rows // architecture.head_dim * inner_width(architecture, assignment)
    if target == "mlp" and assignment and role != architecture.family.mlp_output:
        return inner_width(architecture, assignment)
    return matrix.rows
