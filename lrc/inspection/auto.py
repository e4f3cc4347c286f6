"""``auto``: the method that loses least of a target, and of a component whether it goes as one or by its projections.

Errors are compared where they are of the same thing: for one target of its own output, between a component and its
projections only as nats of the loss, which add up; without gradients the default of ``a3`` stands there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lrc.families import Architecture
from lrc.methods import Method
from lrc.records.inspection import Choice, Estimate, Unit

TIE = 0.01  # of the least error: what is nearer to it goes by what it costs to run
_BLIND = ("weight", "data", "loss")  # by how little of the calibration text a method goes


def choose(
    target: str, keep: float, estimates: Sequence[Estimate], methods: Mapping[str, Method]
) -> Choice | None:
    """Return the method of least error at a kept fraction and the next best; None where none was estimated.

    Errors are nats of the loss where all have them, else of what the first one's is of, without those of other things.
    Within ``TIE`` of it, the one of fewest steps to run, then the one that goes by least of the calibration text.
    """
    there = [estimate for estimate in estimates if estimate.keep == keep]
    if not there:
        return None
    unit: Unit = there[0].unit
    if all(estimate.loss is not None for estimate in there):
        unit = "nats of loss"
    else:
        there = [estimate for estimate in there if estimate.unit == unit]
    ordered = [
        Choice(keep, each.method, _error(each, unit), unit, each.kept / each.whole)
        for each in sorted(there, key=lambda each: _error(each, unit))
    ]
    steps = {each.method: each.steps for each in there}
    least = ordered[0].error
    tied = [each for each in ordered if each.error <= least + TIE * abs(least)]
    best = min(tied, key=lambda each: _cost_to_run(each.method, steps[each.method], target, methods))
    return _beside(best, next((each for each in ordered if each is not best), None))


def choose_component(
    architecture: Architecture,
    component: str,
    whole: Choice,
    parts: Mapping[str, Choice],
    methods: Mapping[str, Method],
) -> Choice:
    """Return a component as one, or its projections one by one with what was chosen for each.

    By nats of the loss where both have them; else as plans do that leave the component unnamed.
    """
    roles = architecture.family.component(component)  # type: ignore[arg-type]
    sizes = {role: architecture.targets[role].parameters for role in roles}
    kept = sum(parts[role].kept * size for role, size in sizes.items()) / sum(sizes.values())
    shared: dict[str, list[str]] = {}
    for role in roles:
        shared.setdefault(parts[role].method, []).append(role)
    name = ", ".join(f"{' and '.join(each)} by {method}" for method, each in shared.items())
    errors = [choice.error for choice in parts.values()]
    if all(choice.unit == "nats of loss" for choice in (whole, *parts.values())):
        one_by_one = Choice(whole.keep, name, sum(errors), whole.unit, kept)
        if whole.error <= one_by_one.error * (1 + TIE):
            return _beside(whole, one_by_one)
        return _beside(one_by_one, whole)
    if methods[whole.method].solvers[component].rotary is not None and architecture.family.rotary != "none":
        return Choice(whole.keep, name, max(errors), "relative error", kept)
    return whole


def _beside(best: Choice, other: Choice | None) -> Choice:
    if other is None:
        return best
    return replace(best, next_method=other.method, next_error=other.error, next_kept=other.kept)


def _error(estimate: Estimate, unit: Unit) -> float:
    if unit == "nats of loss":
        assert estimate.loss is not None
        return estimate.loss
    return estimate.error


def _cost_to_run(method: str, steps: int, target: str, methods: Mapping[str, Method]) -> tuple[int, int, str]:
    solvers = methods[method].solvers
    solver = solvers.get(target) or solvers["projection"]
    return steps, _BLIND.index(solver.metric), method
