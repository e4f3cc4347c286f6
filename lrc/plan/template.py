"""A plan without sizes, for an allocation to find them: worked out at every fraction at which costs are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lrc.checkpoint.reader import CheckpointReader
from lrc.hub.names import ResolvedModel
from lrc.methods import methods
from lrc.moments import collectors
from lrc.plan.job import Job
from lrc.plan.library import find_plan
from lrc.plan.resolve import Draft, parse_plan, resolve

DEFAULT = ("format: 1\n", "the default base plan")
# Only heads that are narrower make the cache smaller.
FOR_CACHE = ("format: 1\ncomponents: {qk: {metric: attention}}\n", "the default base plan for a cache")


def base_plan(base: str | None, *, for_cache: bool = False) -> tuple[str, str]:
    """Text of a base plan and what to call it; None is a3 on everything, ``for_cache`` with qk as a component."""
    if base is None:
        return FOR_CACHE if for_cache else DEFAULT
    return find_plan(base)


def templates(
    model: ResolvedModel, reader: CheckpointReader, text: str, source: str, keeps: Sequence[float]
) -> list[Job]:
    """A base plan at every kept fraction; its own top-level ``keep`` gives way.

    Raises UserError with every mistake of the plan, and where it has sizes in the layers besides what it leaves whole;
    those that it has outside stay as they are.
    """
    draft = parse_plan(text, source)
    found = []
    for keep in keeps:
        sized = Draft(draft.plan.model_copy(update={"keep": keep}), draft.document)
        resolved = resolve(sized, reader.architecture, methods(), collectors(), finder="the allocation")
        if fixed := [a.target for a in resolved.outer if a.target not in resolved.shared]:
            names = " and ".join(fixed)
            unmeasured = f"{source}: what {names} costs is not measured, so predictions leave it out"
            resolved = replace(resolved, warnings=(*resolved.warnings, unmeasured))
        found.append(Job(model, reader, text, source, resolved))
    return found
