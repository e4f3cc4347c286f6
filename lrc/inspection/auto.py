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
ALIKE = 0.01  # of the larger kept fraction: what two keep that differ by more is told beside their errors
_BLIND = ("weight", "data", "loss")  # by how little of the calibration text a method goes


def choose(
    target: str, keep: float, estimates: Sequence[Estimate], methods: Mapping[str, Method]
) -> Choice | None:
    """The method of least error at a kept fraction; None where none was estimated.

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
    ordered = sorted(there, key=lambda each: _error(each, unit))
    least = _error(ordered[0], unit)
    tied = [each for each in ordered if _error(each, unit) <= least + TIE * abs(least)]
    best = min(tied, key=lambda each: _cost_to_run(each, target, methods))
    rest = [each for each in ordered if each is not best]
    error = _error(best, unit)
    other = rest[0] if rest else best
    if not rest:
        reason = f"{_figure(error, unit)}; no other method that could be estimated solves {target}"
    elif len(tied) > 1:
        other = min((each for each in tied if each is not best), key=lambda each: _error(each, unit))
        why = _why(_cost_to_run(best, target, methods), _cost_to_run(other, target, methods))
        reason = (
            f"{_figure(error, unit)} and {other.method}'s {_figure(_error(other, unit), unit)} are within "
            f"{TIE:.0%} of the least, and it {why}"
        )
    else:
        reason = (
            f"{_figure(error, unit)} against {_figure(_error(rest[0], unit), unit)} by {rest[0].method}, "
            "the next best"
        )
    reason += _kept(_fraction(best), _fraction(other))
    return Choice(keep, best.method, error, unit, reason, _fraction(best))


def choose_component(
    architecture: Architecture,
    component: str,
    whole: Choice,
    parts: Mapping[str, Choice],
    methods: Mapping[str, Method],
) -> Choice:
    """A component as one, or its projections one by one with what was chosen for each.

    By nats of the loss where both have them; else as plans do that leave the component unnamed.
    """
    roles = architecture.family.component(component)  # type: ignore[arg-type]
    sizes = {role: architecture.targets[role].parameters for role in roles}
    kept = sum(parts[role].kept * size for role, size in sizes.items()) / sum(sizes.values())
    shared: dict[str, list[str]] = {}
    for role in roles:
        shared.setdefault(parts[role].method, []).append(role)
    one_by_one = ", ".join(f"{' and '.join(each)} by {method}" for method, each in shared.items())
    if whole.unit == "nats of loss" and all(choice.unit == whole.unit for choice in parts.values()):
        summed = sum(choice.error for choice in parts.values())
        figures = _figure(whole.error, whole.unit), _figure(summed, whole.unit)
        if whole.error <= summed * (1 + TIE):
            tie = whole.error > summed * (1 - TIE)
            why = ", a tie, and as one it takes no more steps than dense" if tie else ""
            reason = (
                f"{figures[0]} as one against {figures[1]} for {one_by_one}{why}{_kept(whole.kept, kept)}"
            )
            return replace(whole, reason=reason)
        reason = (
            f"{figures[1]} one by one against {figures[0]} as one by {whole.method}{_kept(kept, whole.kept)}"
        )
        return Choice(whole.keep, one_by_one, summed, whole.unit, reason, kept)
    solver = methods[whole.method].solvers[component]
    unlike = "errors of the component and of its projections are of other things, which --gradients compares"
    if solver.rotary is not None and architecture.family.rotary != "none":
        reason = f"{whole.method} leaves {component} to its projections where positions are rotary; {unlike}"
        most = max(choice.error for choice in parts.values())
        return Choice(whole.keep, one_by_one, most, "relative error", reason, kept)
    return replace(whole, reason=f"{whole.reason}; {unlike}")


def _error(estimate: Estimate, unit: Unit) -> float:
    if unit == "nats of loss":
        assert estimate.loss is not None
        return estimate.loss
    return estimate.error


def _cost_to_run(estimate: Estimate, target: str, methods: Mapping[str, Method]) -> tuple[int, int, str]:
    solvers = methods[estimate.method].solvers
    solver = solvers.get(target) or solvers["projection"]
    return estimate.steps, _BLIND.index(solver.metric), estimate.method


def _why(best: tuple[int, int, str], other: tuple[int, int, str]) -> str:
    """What decides between two costs to run."""
    if best[0] < other[0]:
        return "takes fewer steps to run"
    return "goes by less of the calibration text" if best[1] < other[1] else "comes first by its name"


def _fraction(estimate: Estimate) -> float:
    return estimate.kept / estimate.whole


def _kept(best: float, other: float) -> str:
    """What both keep, where that differs: an error at fewer weights is no worse for being larger."""
    if abs(best - other) <= ALIKE * max(best, other):
        return ""
    return f"; they keep {best:.1%} and {other:.1%}"


def _figure(error: float, unit: Unit) -> str:
    return f"{error:.3g} {unit}"
