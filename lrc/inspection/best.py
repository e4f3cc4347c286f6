"""Choose the method with the least predicted error, for a component as one or by its projections.

Errors are compared only where they measure the same thing: for one target, of its own output; between a component and
its projections, as nats of the loss, which add up. Without gradients, components follow the default of ``a3``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lrc.families import Architecture
from lrc.families.family import Component
from lrc.methods import Method
from lrc.plan.precedence import COMPONENTS
from lrc.records.inspection import Choice, Estimate, Unit

TIE = 0.01  # of the least error; among errors within it, the cheapest to run is chosen
_BLIND = ("weight", "data", "loss")  # metrics, from the least to the most calibration data


def choices(
    architecture: Architecture,
    keeps: Sequence[float],
    estimates: Mapping[str, Sequence[Estimate]],
    methods: Mapping[str, Method],
) -> dict[str, list[Choice]]:
    """Return by target the choice at each kept fraction; a component is compared with its projections."""
    found: dict[str, list[Choice]] = {name: [] for name in estimates}
    for keep in keeps:
        chosen = {name: choose(name, keep, each, methods) for name, each in estimates.items()}
        alone = {name: choice for name, choice in chosen.items() if choice is not None}
        for name, choice in alone.items():
            if name in COMPONENTS and alone.keys() >= {*architecture.family.component(name)}:
                choice = choose_component(architecture, name, choice, alone, methods)
            found[name].append(choice)
    return found


def choose(
    target: str, keep: float, estimates: Sequence[Estimate], methods: Mapping[str, Method]
) -> Choice | None:
    """Return the method of least error at a kept fraction and the next best; None if nothing was estimated there.

    Errors are nats of the loss where all estimates have them; else only estimates with the first one's unit compare.
    Among errors within ``TIE``, the method with the fewest steps is chosen, then that which reads least calibration.
    """
    there = [estimate for estimate in estimates if estimate.keep == keep]
    if not there:
        return None
    unit: Unit = "nats of loss"
    errors = [each.loss for each in there if each.loss is not None]
    if len(errors) < len(there):
        unit = there[0].unit
        there = [each for each in there if each.unit == unit]
        errors = [each.error for each in there]

    def cost_to_run(choice: Choice) -> tuple[int, int, str]:
        solvers = methods[choice.method].solvers
        solver = solvers.get(target) or solvers["projection"]
        return steps[choice.method], _BLIND.index(solver.metric), choice.method

    steps = {each.method: each.steps for each in there}
    found = [
        Choice(keep, each.method, error, unit, each.kept / each.whole)
        for error, each in sorted(zip(errors, there, strict=True), key=lambda pair: pair[0])
    ]
    limit = found[0].error + TIE * abs(found[0].error)
    best = min((choice for choice in found if choice.error <= limit), key=cost_to_run)
    return _with_next(best, next((choice for choice in found if choice is not best), None))


def choose_component(
    architecture: Architecture,
    component: Component,
    whole: Choice,
    alone: Mapping[str, Choice],
    methods: Mapping[str, Method],
) -> Choice:
    """Return the choice of a component as one, or of its projections one by one.

    They compare by nats of the loss; without these the choice is that of a plan that does not name the component.
    """
    roles = architecture.family.component(component)
    parts = {role: alone[role] for role in roles}
    sizes = {role: architecture.targets[role].parameters for role in roles}
    kept = sum(parts[role].kept * size for role, size in sizes.items()) / sum(sizes.values())
    shared: dict[str, list[str]] = {}
    for role, choice in parts.items():
        shared.setdefault(choice.method, []).append(role)
    name = ", ".join(f"{' and '.join(each)} by {method}" for method, each in shared.items())
    errors = [choice.error for choice in parts.values()]
    if all(choice.unit == "nats of loss" for choice in (whole, *parts.values())):
        one_by_one = Choice(whole.keep, name, sum(errors), whole.unit, kept)
        if whole.error <= one_by_one.error * (1 + TIE):
            return _with_next(whole, one_by_one)
        return _with_next(one_by_one, whole)
    if methods[whole.method].solvers[component].rotary is not None and architecture.family.rotary != "none":
        return Choice(whole.keep, name, max(errors), "relative error", kept)
    return whole


def _with_next(best: Choice, other: Choice | None) -> Choice:
    if other is None:
        return best
    return replace(best, next_method=other.method, next_error=other.error, next_kept=other.kept)
