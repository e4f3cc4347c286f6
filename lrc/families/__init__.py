"""Model families: module names and weight orientations, which no other package contains."""

from __future__ import annotations

import sys
from functools import cache

from lrc.discovery import submodules
from lrc.errors import UserError, nearest
from lrc.families.architecture import (
    Architecture,
    Heads,
    Matrix,
    Target,
    canonical,
    describe,
    head_counts,
    logit_rule,
)
from lrc.families.family import Family, Stored

__all__ = [
    "Architecture",
    "Family",
    "Heads",
    "Matrix",
    "Stored",
    "Target",
    "canonical",
    "describe",
    "families",
    "family_of",
    "head_counts",
    "logit_rule",
]


@cache
def families() -> dict[str, Family]:
    """Return every family by ``model_type``."""
    found = [module.FAMILY for _, module in submodules(sys.modules[__name__]) if hasattr(module, "FAMILY")]
    return {family.model_type: family for family in found}


def family_of(model_type: str) -> Family:
    """Return the family of a ``model_type``. Raises UserError naming the nearest one if lrc does not support it."""
    if model_type not in families():
        raise UserError(f"model family {model_type!r} is not supported; {nearest(model_type, families())}")
    return families()[model_type]
