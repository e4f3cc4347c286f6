"""Compute the size of every target and of the output checkpoint from headers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lrc.checkpoint.headers import StoredTensor
from lrc.checkpoint.reader import CheckpointReader
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
        name = f"{family.outer[a.target]}.weight"
        tensors[name] = replace(tensors[name], shape=(a.kept,))
    for layer in job.plan.layers:
        prefix = f"{family.layers}.{layer.index}."
        replaced = _replaced(reader.architecture, layer)
        modules = tuple(f"{prefix}{family.projections[role].module}." for role in replaced)
        tensors = (
            {name: stored for name, stored in tensors.items() if not name.startswith(modules)}
            if modules
            else tensors
        )
        tensors |= _new_tensors(reader, layer, replaced)
        if replaced >= set(ATTENTION_ROLES):
            widths = {a.target: inner_width(reader.architecture, a) for a in layer.assignments}
            qk, v = (widths.get(name, reader.architecture.head_dim) for name in ("qk", "ov"))
            table[prefix + family.attention] = attention_entry(qk, v, False)
    size = size_of(tensors.values(), reader.architecture, reader.dtype, table)
    targets, beyond = reader.architecture.targets | reader.architecture.outer, 0
    inside = ((layer.index, a) for layer in job.plan.layers for a in layer.assignments)
    for index, a in (*((None, a) for a in job.plan.outer), *inside):
        # kept weights may take other bytes than equally many weights as the checkpoint stores them
        each = reader.weight_bytes(targets[a.target], index)
        beyond += solver_of(a).size.bytes(targets[a.target], a.size, a.options, each) - round(a.kept * each)
    return replace(size, bytes=size.bytes + beyond)


def inner_width(architecture: Architecture, assignment: Assignment) -> int:
    """Return the inner dimension that an assignment leaves."""
    target = (architecture.targets | architecture.outer)[assignment.target]
    return solver_of(assignment).size.inner(target, assignment.size)


def _replaced(architecture: Architecture, layer: LayerPlan) -> set[str]:
    """Return the roles whose tensors are replaced; all that a module stores apart if it must."""
    family, found = architecture.family, set[str]()
    for a in layer.assignments:
        roles = set(architecture.targets[a.target].matrices)
        apart = a.target in ("qk", "ov") or any(family.projections[role].fused for role in roles)
        found |= roles.union(*(names for names in family.splits.values() if apart and roles & set(names)))
    return found


def _new_tensors(reader: CheckpointReader, layer: LayerPlan, replaced: set[str]) -> dict[str, StoredTensor]:
    """Return the tensors of replaced roles; factors are one tensor of the right size."""
    architecture, prefix = reader.architecture, f"{reader.family.layers}.{layer.index}."
    found, covered = dict[str, StoredTensor](), dict[str, Assignment]()
    for a in layer.assignments:
        covered |= dict.fromkeys(architecture.targets[a.target].matrices, a)
        if a.target == "qk" and architecture.family.rotary != "none":
            shape = (architecture.kv_heads, inner_width(architecture, a))
            found[f"{prefix}rotary_columns"] = StoredTensor(shape, torch.int64, reader.folder)
    for role in sorted(replaced):
        a, whole, weight = (
            covered.get(role),
            architecture.matrices[role].parameters,
            reader.weight(role, layer.index),
        )
        # the matrices of a component shrink alike
        kept = whole if a is None else whole * a.kept // a.whole
        found[f"{prefix}{role}.weight"] = replace(weight, shape=(kept,))
        old = reader.tensors.get(f"{prefix}{reader.family.projections[role].module}.bias", weight)
        found[f"{prefix}{role}.bias"] = replace(old, shape=(_bias(architecture, role, a),))
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
