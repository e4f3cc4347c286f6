"""Allocations without held-out text: uniform from shapes, energy, fisher and importance one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lrc.allocation.contract import Advance, LayerProblems, Setting, for_each_layer
from lrc.allocation.spend import Curve
from lrc.compression.solve import solve
from lrc.errors import UserError
from lrc.maths.linalg import direction_scores
from lrc.methods.contract import Prediction, Problem, ProjectionProblem
from lrc.methods.shared.pairs import input_moment
from lrc.methods.sizes import PairRank, SizeValue
from lrc.plan.resolved import Assignment
from lrc.walk.needs import solver_of


def uniform_costs(setting: Setting, curves: Sequence[Curve], advance: Advance) -> tuple[list[Curve], None]:
    """Return w·(1 − f)² for a kept fraction f of w weights, so that equal f means equal saving per weight, 2(1 − f)."""
    found = []
    for curve in curves:
        removed = [1 - kept / curve.whole for kept in curve.weights]
        found.append(replace(curve, costs=tuple(curve.whole * share**2 for share in removed)))
    return found, None


def energy_costs(setting: Setting, curves: Sequence[Curve], advance: Advance) -> tuple[list[Curve], None]:
    """Return relative squared errors, each times the target's share of the weights in the budget.

    Errors of qk, ov, mlp and projections differ in unit; relative errors are comparable: 0 for a whole target, 1 for a
    removed one. Without the share of weights, small targets would stay whole. Unlike ``fisher_costs``, these costs
    ignore how much a layer affects the loss.
    """
    whole = setting.plans[0].budget.whole

    def share(assignment: Assignment, predicted: Prediction) -> float:
        lost = predicted.error / predicted.reference if predicted.reference > 0 else 0.0
        return lost * assignment.whole / whole

    return _by_size(setting, curves, advance, share)


def fisher_costs(setting: Setting, curves: Sequence[Curve], advance: Advance) -> tuple[list[Curve], None]:
    """Return rises of the loss in nats per token, predicted to second order from gradients.

    Raises UserError for a method that predicts no loss.
    """

    def loss(assignment: Assignment, predicted: Prediction) -> float:
        if predicted.loss is None:
            raise UserError(
                f"allocation 'fisher' needs predicted losses, and {assignment.method!r} as it is set predicts none for "
                f"{assignment.target}; allocate by energy, or measure by sensitivity"
            )
        return predicted.loss

    return _by_size(setting, curves, advance, loss)


def importance_costs(setting: Setting, curves: Sequence[Curve], advance: Advance) -> tuple[list[Curve], None]:
    """Return at every rank half the sum of σ_i² (u_iᵀ G u_i)(v_iᵀ C v_i) over the dropped directions.

    u, σ, v: the matrix's SVD. C: moment of its input. G: moment of the loss gradient at its output. Half a score is the
    predicted rise of the loss, in nats, from dropping that direction alone. The budget compares directions by score per
    weight.
    """
    found: dict[tuple[int | None, str], list[float]] = {}

    def look(layer: LayerProblems) -> None:
        dropped = setting.processes.spread([*layer.problems.values()], _dropped)
        found.update(zip(((layer.layer, target) for target in layer.problems), dropped, strict=True))

    for_each_layer(setting, look, advance)
    priced = []
    for curve in curves:
        nats = found[curve.layer, curve.target]
        ranks = (size for size in curve.sizes if isinstance(size, int))
        priced.append(replace(curve, costs=tuple(nats[rank] for rank in ranks)))
    return priced, None


def refuse_without_directions(assignment: Assignment) -> None:
    """Raise UserError for a target that is no low-rank pair, so that importance cannot score its directions."""
    if not isinstance(solver_of(assignment).size, PairRank):
        raise UserError(
            f"allocation 'importance' sorts singular directions, and {assignment.target} under "
            f"{assignment.method!r} has none; it is for single projections stored as low-rank pairs, such as those "
            "of svd. Allocate by fisher or energy here"
        )


def _by_size(
    setting: Setting,
    curves: Sequence[Curve],
    advance: Advance,
    cost: Callable[[Assignment, Prediction], float],
) -> tuple[list[Curve], None]:
    found: dict[tuple[int | None, str, SizeValue], float] = {}

    def look(layer: LayerProblems) -> None:
        def predicted(assignment: Assignment) -> float:
            return cost(assignment, solve(layer.problems[assignment.target], assignment).predicted)

        costs = setting.processes.spread([*layer.assignments.values()], predicted)
        found.update(zip(((layer.layer, *key) for key in layer.assignments), costs, strict=True))

    for_each_layer(setting, look, advance)
    return [replace(c, costs=tuple(found[c.layer, c.target, size] for size in c.sizes)) for c in curves], None


def _dropped(problem: Problem) -> list[float]:
    """Return the nats of dropping all but the best r directions, for r = 0 to all."""
    assert isinstance(problem, ProjectionProblem)
    assert problem.gradient is not None, "directions are scored with the gradients"
    scores = direction_scores(problem.matrix.weight, input_moment(problem), problem.gradient)
    # Rounding can make a float32 moment indefinite and a score negative.
    tails = scores.clamp_min(0).sort(descending=True).values.flip(0).cumsum(0).flip(0)
    return (torch.cat([tails, tails.new_zeros(1)]) / 2).tolist()
