"""Run-time modules of compressed checkpoints: one file a kind, the compressed attention, the module table."""

from __future__ import annotations

import sys
from functools import cache

from lrc.discovery import submodules
from lrc.modules.kind import Entry, StructuredLinear

__all__ = ["Entry", "StructuredLinear", "kinds"]


@cache
def kinds() -> dict[str, type[StructuredLinear]]:
    """Every storage kind, by the name that table entries give it."""
    found: dict[str, type[StructuredLinear]] = {}
    for _, module in submodules(sys.modules[__name__]):
        for item in vars(module).values():
            if isinstance(item, type) and issubclass(item, StructuredLinear) and hasattr(item, "kind"):
                found[item.kind] = item
    return found
