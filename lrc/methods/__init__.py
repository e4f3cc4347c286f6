"""Factorization methods: one file for each method, one function for each kind of target."""

from __future__ import annotations

import sys
from functools import cache

from lrc.discovery import submodules
from lrc.methods.contract import Method, Solver

__all__ = ["Method", "methods"]


@cache
def methods() -> dict[str, Method]:
    """Return every method in this folder, by name."""
    found = {}
    for name, module in submodules(sys.modules[__name__]):
        solvers = [
            item.solver for item in vars(module).values() if isinstance(getattr(item, "solver", None), Solver)
        ]
        if solvers:
            summary = (module.__doc__ or "").strip().splitlines()[0]
            found[name] = Method(name, summary, {solver.target: solver for solver in solvers})
    return found
