"""Write a resolved plan as YAML with sizes by layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lrc.plan.document import flow
from lrc.plan.precedence import Methods, spans
from lrc.plan.resolved import Assignment, ResolvedPlan
from lrc.plan.schema import OUTSIDE, WHOLE, Plan


def write_plan(resolved: ResolvedPlan, methods: Methods, header: Iterable[str]) -> str:
    """Return the text of a plan below a comment of ``header`` lines; layers with the same sizes share a rule.

    The embedding and the head have the sizes that an allocation found, else the plan's own entries. An assignment at
    full size is written as a target that stays whole.
    """
    plan = resolved.plan
    rules: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for layer in resolved.layers:
        entries = {a.target: _entry(a, plan, methods) for a in layer.assignments}
        if entries:
            rules.setdefault(flow(entries), (entries, []))[1].append(layer.index)
    lines = [f"# {' '.join(line.split())}".rstrip() for line in header]
    lines += ["format: 1", f"method: {flow(plan.method)}"]
    outside = {name: e for name, e in plan.projections.entries().items() if name in OUTSIDE}
    if outside:
        found = {a.target: _entry(a, plan, methods) for a in resolved.unsized(None)}
        entries = {
            name: found.get(name, WHOLE) if name in resolved.shared else entry.model_dump(exclude_none=True)
            for name, entry in outside.items()
        }
        lines.append(f"projections: {flow(entries)}")
    if rules:
        lines.append("layers:")
    for entries, members in rules.values():
        match = members[0] if len(members) == 1 else spans(members)
        lines.append(f"  - {flow({'match': match, **entries})}")
    calibration = plan.calibration.model_dump(mode="json", exclude_none=True)
    lines += [f"refit: {plan.refit}", *([f"scale: {plan.scale}"] if plan.scale else [])]
    lines.append(f"calibration: {flow(calibration)}")
    return "\n".join(lines) + "\n"


def _entry(assignment: Assignment, plan: Plan, methods: Methods) -> Any:
    if assignment.kept == assignment.whole:
        return WHOLE
    solver = methods[assignment.method].solver(assignment.target)
    assert solver is not None  # or it would not have been assigned
    defaults = {name: option.default for name, option in solver.options.items()}
    own = {name: value for name, value in assignment.options.items() if value != defaults[name]}
    named = {} if assignment.method == plan.method else {"method": assignment.method}
    return {solver.size.word: assignment.size, **named, **own}
