"""What methods predict that they lose, as one number each, and what ``auto`` makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lrc.compression.solve import solve
from lrc.families import Architecture
from lrc.inspection.auto import choose, choose_component
from lrc.inspection.candidates import Candidate
from lrc.methods import Method
from lrc.methods.contract import Affine, Factors, Prediction, Problem
from lrc.modules import kinds
from lrc.modules.embedding import EMBEDDING
from lrc.plan.precedence import COMPONENTS
from lrc.records.inspection import Choice, Estimate, Unit


def estimate(problem: Problem, candidate: Candidate) -> Estimate:
    """Solve a problem as a candidate has it, for what that loses."""
    one = candidate.assignment
    solution = solve(problem, one)
    error, unit = figure(solution.predicted)
    steps = sum(_steps(part) for part in solution.parts.values())
    return Estimate(
        keep=candidate.keep,
        method=one.method,
        options=dict(one.options),
        size=one.size,
        kept=one.kept,
        whole=one.whole,
        error=error,
        unit=unit,
        loss=solution.predicted.loss,
        steps=steps,
    )


def choices(
    architecture: Architecture,
    keeps: Sequence[float],
    estimates: Mapping[str, Sequence[Estimate]],
    known: Mapping[str, Method],
) -> dict[str, list[Choice]]:
    """What ``auto`` takes of each target at each kept fraction, of components with their projections in view."""
    found: dict[str, list[Choice]] = {name: [] for name in estimates}
    for keep in keeps:
        alone = {
            name: choice
            for name, each in estimates.items()
            if (choice := choose(name, keep, each, known)) is not None
        }
        for name, choice in alone.items():
            if name in COMPONENTS:
                roles = architecture.family.component(name)
                if all(role in alone for role in roles):
                    parts = {role: alone[role] for role in roles}
                    choice = choose_component(architecture, name, choice, parts, known)
            found[name].append(choice)
    return found


def recorded(record: Mapping[str, Any]) -> tuple[float, float | None, Unit]:
    """What a manifest's record of a target predicted and measured, and in what unit that is predicted.

    Measured is the divergence in nats where that is what was, else the relative error.
    """
    error, unit = figure(Prediction(**record["predicted"]))
    measured = record["measured"]
    if measured["kl"] is not None:
        return error, measured["kl"], unit
    return error, relative(measured["error"], measured["reference"]), unit


def figure(prediction: Prediction) -> tuple[float, Unit]:
    """The one number by which a prediction is told, and what it is."""
    if prediction.metric == "kl":
        return prediction.error, "nats KL"
    if prediction.metric == "loss":
        return prediction.error, "nats of loss"
    return (
        prediction.relative,
        "relative error of scores" if prediction.metric == "scores" else "relative error",
    )


def relative(error: float | None, reference: float | None) -> float | None:
    """(error / reference)^½; None where either is."""
    if error is None or reference is None:
        return None
    return (error / reference) ** 0.5 if reference > 0 else 0.0


def _steps(part: Affine | Factors) -> int:
    """What a token goes through: one product with a matrix, one look-up and a product with an embedding."""
    if isinstance(part, Affine):
        return 1
    return 2 if part.kind == EMBEDDING else kinds()[part.kind].steps
