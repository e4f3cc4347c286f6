"""A plan without sizes, for ``lrc plan`` to find them: worked out at every fraction that is measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lrc.checkpoint.reader import CheckpointReader
from lrc.hub.names import ResolvedModel
from lrc.job import Job
from lrc.methods import methods
from lrc.moments import COLLECTORS
from lrc.plan.document import Path
from lrc.plan.library import find_plan
from lrc.plan.resolve import Draft, parse_plan, resolve
from lrc.plan.schema import WHOLE, Entry

DEFAULT = ("format: 1\n", "the default base plan")


def templates(
    model: ResolvedModel, reader: CheckpointReader, base: str | None, keeps: Sequence[float]
) -> list[Job]:
    """The base plan (None: a3 on all components) at every kept fraction; its own top-level ``keep`` gives way.

    Raises UserError with every mistake of the plan, and where it has sizes besides what it leaves whole.
    """
    text, source = DEFAULT if base is None else find_plan(base)
    draft = parse_plan(text, source)
    _refuse_sizes(draft)
    found = []
    for keep in keeps:
        sized = Draft(draft.plan.model_copy(update={"keep": keep}), draft.document)
        resolved = resolve(sized, reader.architecture, methods(), COLLECTORS)
        found.append(Job(model, reader, text, source, resolved))
    return found


def _refuse_sizes(draft: Draft) -> None:
    """Note every size of the plan as a mistake of its document."""
    words = {solver.size.word for method in methods().values() for solver in method.solvers.values()}
    for path, entry in _entries(draft):
        sized = [word for word in words if word in entry.own]
        if entry.keep not in (None, 1):
            sized.append("keep")
        for word in sized:
            _refuse(draft, (*path, word))
    for number, rule in enumerate(draft.plan.layers):
        if rule and rule.keep not in (None, 1):
            _refuse(draft, ("layers", number, "keep"))
    draft.document.stop()


def _refuse(draft: Draft, path: Path) -> None:
    draft.document.mistake(
        path, f"is a size, which lrc plan finds; leave it out, or write {WHOLE} for what stays whole"
    )


def _entries(draft: Draft) -> Iterable[tuple[Path, Entry]]:
    plan = draft.plan
    sections: list[tuple[Path, dict[str, Entry]]] = [
        (("components",), plan.components.entries()),
        (("projections",), plan.projections.entries()),
        *((("layers", i), rule.entries()) for i, rule in enumerate(plan.layers) if rule),
    ]
    return [((*path, name), entry) for path, entries in sections for name, entry in entries.items()]
