"""Energy and Fisher: costs that the methods predict, one layer at a time, without held-out text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lrc.allocation.contract import Advance, Costs, Setting, Unit, blank_curves
from lrc.allocation.problems import Posed, each_posed
from lrc.compression.solve import solve
from lrc.errors import UserError
from lrc.methods.contract import Prediction
from lrc.methods.sizes import SizeValue
from lrc.plan.resolved import Assignment


def energy_costs(setting: Setting, advance: Advance) -> Costs:
    """Return relative squared errors, each times the target's share of the weights in the budget.

    Errors of qk, ov, mlp and projections differ in unit; relative errors are comparable: 0 for a whole target, 1 for a
    removed one. Without the share of weights, small targets would stay whole. Unlike ``fisher_costs``, these costs
    ignore how much a layer affects the loss.
    """
    whole = setting.plans[0].budget.whole

    def share(assignment: Assignment, predicted: Prediction) -> float:
        lost = predicted.error / predicted.reference if predicted.reference > 0 else 0.0
        return lost * assignment.whole / whole

    return _costs(setting, advance, "relative squared error", share)


def fisher_costs(setting: Setting, advance: Advance) -> Costs:
    """Return rises of the loss in nats per token, predicted to second order from gradients.

    Raises UserError for a method that predicts no loss.
    """
    return _costs(setting, advance, "predicted nats", _loss)


def _costs(
    setting: Setting, advance: Advance, unit: Unit, cost: Callable[[Assignment, Prediction], float]
) -> Costs:
    found: dict[tuple[int | None, str, SizeValue], float] = {}

    def look(posed: Posed) -> None:
        def predicted(assignment: Assignment) -> float:
            return cost(assignment, solve(posed.problems[assignment.target], assignment).predicted)

        costs = setting.processes.spread([*posed.asked.values()], predicted)
        for key, nats in zip(posed.asked, costs, strict=True):
            found[posed.layer, *key] = nats

    each_posed(setting, look, advance)
    curves = [
        replace(curve, costs=tuple(found[curve.layer, curve.target, size] for size in curve.sizes))
        for curve in blank_curves(setting.reader.architecture, setting.plans)
    ]
    return Costs(curves, unit)


def _loss(assignment: Assignment, predicted: Prediction) -> float:
    if predicted.loss is None:
        raise UserError(
            f"allocation 'fisher' needs predicted losses, and {assignment.method!r} as it is set predicts none for "
            f"{assignment.target}; allocate by energy, or measure by sensitivity"
        )
    return predicted.loss
