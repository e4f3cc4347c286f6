"""Refuse sizes in a plan whose sizes an allocation finds."""

from __future__ import annotations

from lrc.plan.document import Document, Path
from lrc.plan.precedence import Methods
from lrc.plan.schema import OUTSIDE, WHOLE, Entry, Plan


def refuse_sizes(plan: Plan, document: Document, methods: Methods, finder: str) -> None:
    """Note as a mistake every size that a plan sets in its layers, below the top level; ``finder`` finds them."""
    words = {solver.size.word for method in methods.values() for solver in method.solvers.values()}
    rules = {("layers", i): rule for i, rule in enumerate(plan.layers) if rule}
    inside = {name: entry for name, entry in plan.projections.entries().items() if name not in OUTSIDE}
    sections: dict[Path, dict[str, Entry]] = {
        ("components",): plan.components.entries(),
        ("projections",): inside,
        **{path: rule.entries() for path, rule in rules.items()},
    }
    entries = {(*path, name): entry for path, section in sections.items() for name, entry in section.items()}
    sizes = [(*path, word) for path, entry in entries.items() for word in words & entry.own.keys()]
    sizes += [(*path, "keep") for path, each in (entries | rules).items() if each.keep not in (None, 1)]
    for path in sizes:
        document.mistake(
            path, f"is a size, which {finder} finds; leave it out, or write {WHOLE} for what stays whole"
        )


def refuse_no_budget(plan: Plan, document: Document) -> None:
    """Note a mistake if a plan that asks for an allocation has no single keep below 1 to share out."""
    if isinstance(plan.keep, tuple):
        message = f"allocate {plan.allocate} shares out one fraction over all layers; write one, such as 0.8"
        document.mistake(("keep",), message)
    elif plan.keep == 1:
        message = f"{plan.allocate} has nothing to share out; write a keep below 1"
        document.mistake(("allocate",), message)
