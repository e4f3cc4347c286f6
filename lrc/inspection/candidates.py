"""List the methods and sizes that apply to a target, and estimate what each would lose."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from lrc.compression.solve import solve
from lrc.families import Architecture, Target
from lrc.methods import Method
from lrc.methods.contract import Affine, Factors, Prediction, Problem, Solver
from lrc.modules import kinds
from lrc.modules.low_rank import EMBEDDING
from lrc.plan.resolved import Assignment
from lrc.records.inspection import Estimate, Unit

TABLE_COLLECTORS = frozenset({"moments"})  # what is collected outside the layers


@dataclass(frozen=True)
class Candidate:
    """An assignment at the method's size nearest to the fraction ``keep``."""

    keep: float
    assignment: Assignment

    def estimate(self, problem: Problem) -> Estimate:
        """Solve a problem and return the predicted error."""
        one = self.assignment
        solution = solve(problem, one)
        error, unit = figure(solution.predicted)
        return Estimate(
            keep=self.keep,
            method=one.method,
            options=dict(one.options),
            size=one.size,
            kept=one.kept,
            whole=one.whole,
            error=error,
            unit=unit,
            loss=solution.predicted.loss,
            steps=sum(map(_steps, solution.parts.values())),
        )


def candidates(
    architecture: Architecture,
    targets: Iterable[Target],
    methods: Mapping[str, Method],
    keeps: Sequence[float],
    collectors: Collection[str],
) -> dict[str, list[Candidate]]:
    """Return by target every legal size that saves weights, of every method that can solve it with ``collectors``."""
    return {
        target.name: [
            Candidate(keep, found)
            for name, method in methods.items()
            if (solver := _solver(method, target.name))
            and (options := able_options(solver, collectors)) is not None
            and solver.refuses(architecture.geometry, options) is None
            for keep in keeps
            if (found := _assignment(target, name, solver, keep, options))
        ]
        for target in targets
    }


def able_options(solver: Solver, collectors: Collection[str]) -> dict[str, Any] | None:
    """Return options with which a solver needs no more than ``collectors``, defaults first; None if there are none."""
    if not set(solver.needs) <= set(collectors):
        return None
    options: dict[str, Any] = {}
    for name, option in solver.options.items():
        values = (option.default, *get_args(option.annotation))
        able = (value for value in values if solver.option_needs.get((name, value)) in (None, *collectors))
        if (found := next(able, None)) is None:
            return None
        options[name] = found
    return options


def figure(prediction: Prediction) -> tuple[float, Unit]:
    """Return a prediction as one number, and its unit."""
    if prediction.metric == "kl":
        return prediction.error, "nats KL"
    if prediction.metric == "loss":
        return prediction.error, "nats of loss"
    unit: Unit = "relative error of scores" if prediction.metric == "scores" else "relative error"
    return prediction.relative, unit


def _solver(method: Method, target: str) -> Solver | None:
    """Return the solver of a component or the embedding itself, or of any projection."""
    projection = target not in ("qk", "ov", "mlp", "embed")
    return method.solvers.get(target) or (method.solvers.get("projection") if projection else None)


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


def _steps(part: Affine | Factors) -> int:
    """Return the matrix products and permutations that a token goes through; an embedding is a look-up and one."""
    if isinstance(part, Affine):
        return 1
    return 2 if part.kind == EMBEDDING else kinds()[part.kind].steps
