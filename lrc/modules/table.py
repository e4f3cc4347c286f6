"""Apply the module table of a compressed checkpoint: kinds and shapes of the modules that it replaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrc.errors import UserError, nearest
from lrc.families import Family
from lrc.modules.attention import ReducedAttention, reduce_attention
from lrc.modules.kind import Entry, kind_of, kinds, with_nested
from lrc.modules.low_rank import EMBEDDING, FactorizedEmbedding
from lrc.modules.mlp import GatedMLP, split_mlp

Table = dict[str, Entry]

ATTENTION = "attention"
MLP = "mlp"  # whose input projections are stored separately
DENSE = "dense"
APPLIED = "_lrc_table_applied"


def apply_table(root: nn.Module, table: Mapping[str, Mapping[str, Any]], family: Family) -> None:
    """Replace in place the modules that a table names by paths from ``root``, a model or one decoder layer.

    New modules are uninitialised, with the device and dtype of ``root``. A second call changes nothing.
    Raises UserError for a kind, a path or an entry that does not fit.
    """
    if getattr(root, APPLIED, False):
        return
    _check(table, family)
    like = next(root.parameters())
    for path, entry in sorted(table.items(), key=lambda item: item[1]["kind"] not in (ATTENTION, MLP)):
        parent_path, _, name = path.rpartition(".")
        try:
            parent = root.get_submodule(parent_path)
            if not (isinstance(parent, ReducedAttention | GatedMLP) and name in _apart(family)):
                parent.get_submodule(name)
        except AttributeError:
            raise UserError(f"the module table names {path!r}, which the model does not have") from None
        try:
            if entry["kind"] == ATTENTION:
                reduce_attention(parent.get_submodule(name), entry, family)
            elif entry["kind"] == MLP:
                split_mlp(parent.get_submodule(name), family)
            else:
                setattr(parent, name, build(entry, like))
        except KeyError as missing:
            raise UserError(f"the module table's entry for {path!r} lacks {missing}") from None
    setattr(root, APPLIED, True)


def build(entry: Mapping[str, Any], like: Tensor) -> nn.Module:
    """Make the uninitialised module of a table entry other than attention, with the device and dtype of ``like``."""
    with torch.device("meta"):
        if entry["kind"] == DENSE:
            module = nn.Linear(entry["in"], entry["out"], bias=entry["bias"])
        elif entry["kind"] == EMBEDDING:
            module = FactorizedEmbedding.from_entry(entry)
        else:
            module = kind_of(entry).from_entry(entry)
    return module.to(like.dtype).to_empty(device=like.device)


def attention_entry(qk: int, v: int, rotary_columns: bool) -> Entry:
    """Return the entry of an attention whose heads are ``qk`` and ``v`` wide.

    ``rotary_columns``: whether some rotary dimensions were dropped, so that the kept columns are stored.
    """
    return {"kind": ATTENTION, "qk": qk, "v": v, "rotary_columns": rotary_columns}


def _apart(family: Family) -> set[str]:
    """Return the names of projections that attention and MLP may hold and the family's own modules lack."""
    return {name for names in family.splits.values() for name in names.values()}


def _check(table: Mapping[str, Mapping[str, Any]], family: Family) -> None:
    known = {ATTENTION, MLP, DENSE, EMBEDDING, *kinds()}
    for path, entry in table.items():
        for kind in (each.get("kind") for each in with_nested(entry)):
            if kind not in known:
                raise UserError(
                    f"{path!r} is stored as {kind!r}, which this lrc does not know; {nearest(str(kind), known)}; "
                    "a newer lrc may: pip install --upgrade lrc"
                )
        if entry["kind"] in (ATTENTION, MLP):
            for name in (family.split if entry["kind"] == ATTENTION else family.split_mlp).values():
                if f"{path}.{name}" not in table:
                    raise UserError(
                        f"the module table has {path!r} but not its projection {path + '.' + name!r}"
                    )
