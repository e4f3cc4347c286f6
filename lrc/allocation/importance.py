"""Importance: score every singular direction of every matrix and keep the best within the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lrc.allocation.contract import Advance, Costs, Setting, blank_curves
from lrc.allocation.problems import Posed, each_posed
from lrc.allocation.spend import Curve
from lrc.errors import UserError
from lrc.families import Architecture
from lrc.maths.linalg import direction_scores
from lrc.methods.contract import Problem, ProjectionProblem
from lrc.methods.shared.pairs import input_moment
from lrc.methods.sizes import PairRank
from lrc.plan.resolved import ResolvedPlan
from lrc.walk.needs import solver_of


def blank(architecture: Architecture, plans: Sequence[ResolvedPlan]) -> list[Curve]:
    """Return a curve over all ranks for each projection. Raises UserError for targets that are no low-rank pair."""
    for assignment in (a for plan in plans for layer in plan.layers for a in layer.assignments):
        if not isinstance(solver_of(assignment).size, PairRank):
            raise UserError(
                f"allocation 'importance' sorts singular directions, and {assignment.target} under "
                f"{assignment.method!r} has none; it is for single projections stored as low-rank pairs, such as those "
                "of svd. Allocate by fisher or energy here"
            )
    return blank_curves(architecture, plans, every_size=True)


def costs(setting: Setting, advance: Advance) -> Costs:
    """Return at every rank half the sum of σ_i² (u_iᵀ G u_i)(v_iᵀ C v_i) over the dropped directions.

    u, σ, v: the matrix's SVD. C: moment of its input. G: moment of the loss gradient at its output. Half a score is the
    predicted rise of the loss, in nats, from dropping that direction alone. The budget compares directions by score per
    weight.
    """
    found: dict[tuple[int | None, str], list[float]] = {}

    def look(posed: Posed) -> None:
        dropped = setting.processes.spread([*posed.problems.values()], _dropped)
        found.update(zip(((posed.layer, target) for target in posed.problems), dropped, strict=True))

    each_posed(setting, look, advance)
    curves = []
    for curve in blank(setting.reader.architecture, setting.plans):
        nats = found[curve.layer, curve.target]
        ranks = (size for size in curve.sizes if isinstance(size, int))
        curves.append(replace(curve, costs=tuple(nats[rank] for rank in ranks)))
    return Costs(curves, "predicted nats")


def _dropped(problem: Problem) -> list[float]:
    """Return the nats of dropping all but the best r directions, for r = 0 to all."""
    assert isinstance(problem, ProjectionProblem)
    assert problem.gradient is not None, "directions are scored with the gradients"
    scores = direction_scores(problem.matrix.weight, input_moment(problem), problem.gradient)
    # Rounding can make a float32 moment indefinite and a score negative.
    tails = scores.clamp_min(0).sort(descending=True).values.flip(0).cumsum(0).flip(0)
    return (torch.cat([tails, tails.new_zeros(1)]) / 2).tolist()
