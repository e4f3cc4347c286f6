"""What could be done to a target: every method that applies to it, at every kept fraction that is asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from lrc.families import Architecture, Target
from lrc.methods import Method
from lrc.methods.contract import Solver
from lrc.plan.resolved import Assignment

TABLE_COLLECTORS = frozenset({"moments"})  # what is collected outside the layers


@dataclass(frozen=True)
class Candidate:
    """An assignment, and the fraction that it is the method's nearest size to."""

    keep: float
    assignment: Assignment


def candidates(
    architecture: Architecture,
    targets: Iterable[Target],
    methods: Mapping[str, Method],
    keeps: Sequence[float],
    collectors: Collection[str],
) -> dict[str, list[Candidate]]:
    """By target what the methods can do with what is collected, but for sizes that save nothing or are not legal.

    Options have their defaults, but where those need what is not collected the first of their values that does not.
    """
    return {
        target.name: [
            Candidate(keep, found)
            for name, method in methods.items()
            if (solver := own_solver(method, target.name))
            and (options := able_options(solver, collectors)) is not None
            and solver.refuses(architecture.geometry, options) is None
            for keep in keeps
            if (found := _assignment(target, name, solver, keep, options))
        ]
        for target in targets
    }


def own_solver(method: Method, target: str) -> Solver | None:
    """What of a method solves this very target, of a projection its solver of any."""
    alone = target not in ("qk", "ov", "mlp", "embed")
    return method.solvers.get(target) or (method.solvers.get("projection") if alone else None)


def able_options(solver: Solver, collectors: Collection[str]) -> dict[str, Any] | None:
    """Options with which a solver needs no more than ``collectors``; None where there are none."""
    if not set(solver.needs) <= set(collectors):
        return None
    options: dict[str, Any] = {}
    for name, option in solver.options.items():
        values = (option.default, *get_args(option.annotation))
        able = (value for value in values if solver.option_needs.get((name, value)) in (None, *collectors))
        found = next(able, None)
        if found is None:
            return None
        options[name] = found
    return options


def _assignment(
    target: Target, method: str, solver: Solver, keep: float, options: dict[str, Any]
) -> Assignment | None:
    size = solver.size.nearest(target, keep, options)
    if solver.size.refusal(target, size, options):
        return None
    kept = solver.size.weights(target, size, options)
    if kept >= target.parameters:
        return None
    return Assignment(target.name, method, size, options, kept, target.parameters)
