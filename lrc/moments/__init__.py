"""Statistics of a layer's activations, found by scanning this folder, and gradients of the loss."""

from __future__ import annotations

import sys
from functools import cache

from lrc.discovery import submodules
from lrc.moments.gradient import GRADIENTS
from lrc.moments.statistic import Statistic

__all__ = ["collectors", "statistics"]


@cache
def statistics() -> dict[str, type[Statistic]]:
    """Return every statistic in this folder, by name."""
    found: dict[str, type[Statistic]] = {}
    for _, module in submodules(sys.modules[__name__]):
        for item in vars(module).values():
            if isinstance(item, type) and issubclass(item, Statistic) and hasattr(item, "name"):
                found[item.name] = item
    return found


def collectors() -> frozenset[str]:
    """Return the names that solvers may need: all statistics, and ``gradients``."""
    return frozenset({*statistics(), GRADIENTS})
