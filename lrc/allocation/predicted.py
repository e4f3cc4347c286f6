"""Energy and Fisher: what the methods themselves predict that a size costs, a layer at a time, no held-out text."""

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
    """Predicted squared errors over the squared sizes of what they are errors of, times the target's share of weights.

    Errors differ in what they are of: the divergence of attention for qk, outputs that the residual stream adds up for
    ov and mlp, the input of a nonlinearity for many a projection. What they have in common is the share lost, 0 where a
    target is whole and 1 where it is gone; it counts for as much as the target has weights, so that a small target is
    not kept whole for being small. How much a layer matters to the loss is not in it: ``fisher`` knows that.
    """
    whole = setting.plans[0].budget.whole

    def share(assignment: Assignment, predicted: Prediction) -> float:
        lost = predicted.error / predicted.reference if predicted.reference > 0 else 0.0
        return lost * assignment.whole / whole

    return _costs(setting, advance, "relative squared error", share)


def fisher_costs(setting: Setting, advance: Advance) -> Costs:
    """Rises of the loss in nats per token, predicted to second order from the gradients of the loss.

    Raises UserError for a method that predicts none though it has the gradients.
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
