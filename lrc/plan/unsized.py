"""Plans without sizes, as an allocation is to find them."""

from __future__ import annotations

from collections.abc import Iterator

from lrc.plan.document import Document, Path
from lrc.plan.precedence import Methods
from lrc.plan.schema import OUTSIDE, WHOLE, Entry, Plan


def refuse_sizes(plan: Plan, document: Document, methods: Methods, finder: str) -> None:
    """Note every size below the top level of a plan as a mistake of its document; ``finder`` is who finds them.

    Sizes outside the layers are none: an entry there may leave its size to the finder, or fix it.
    """
    words = {solver.size.word for method in methods.values() for solver in method.solvers.values()}
    for path in _sizes(plan, words):
        document.mistake(
            path, f"is a size, which {finder} finds; leave it out, or write {WHOLE} for what stays whole"
        )


def refuse_no_budget(plan: Plan, document: Document) -> None:
    """Note as mistakes what a plan that asks for an allocation has in place of one kept fraction to share out."""
    if isinstance(plan.keep, tuple):
        message = f"allocate {plan.allocate} shares out one fraction over all layers; write one, such as 0.8"
        document.mistake(("keep",), message)
    elif plan.keep == 1:
        message = f"{plan.allocate} has nothing to share out; write a keep below 1"
        document.mistake(("allocate",), message)


def _sizes(plan: Plan, words: set[str]) -> Iterator[Path]:
    for path, entry in _entries(plan):
        yield from ((*path, word) for word in sorted(words) if word in entry.own)
        if entry.keep not in (None, 1):
            yield (*path, "keep")
    for number, rule in enumerate(plan.layers):
        if rule and rule.keep not in (None, 1):
            yield ("layers", number, "keep")


def _entries(plan: Plan) -> Iterator[tuple[Path, Entry]]:
    sections: list[tuple[Path, dict[str, Entry]]] = [
        (("components",), plan.components.entries()),
        (("projections",), {n: e for n, e in plan.projections.entries().items() if n not in OUTSIDE}),
        *((("layers", i), rule.entries()) for i, rule in enumerate(plan.layers) if rule),
    ]
    for path, entries in sections:
        yield from (((*path, name), entry) for name, entry in entries.items())
