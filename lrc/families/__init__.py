"""Model families: the only place that knows a module's name or a weight's orientation."""

from __future__ import annotations

import sys
from functools import cache

from lrc.discovery import submodules
from lrc.errors import UserError, nearest
from lrc.families.family import Architecture, Family, Heads, Matrix, Stored, Target, canonical, describe

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
]


@cache
def families() -> dict[str, Family]:
    """Every family, by ``model_type``."""
    found = [module.FAMILY for _, module in submodules(sys.modules[__name__]) if hasattr(module, "FAMILY")]
    return {family.model_type: family for family in found}


def family_of(model_type: str) -> Family:
    """The family of a ``model_type``; UserError lists the known ones."""
    if model_type not in families():
        raise UserError(f"model family {model_type!r} is not supported; {nearest(model_type, families())}")
    return families()[model_type]
