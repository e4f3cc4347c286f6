"""A model and a plan resolved for it, before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lrc.checkpoint.reader import CheckpointReader
from lrc.hub.names import ResolvedModel, resolve_model
from lrc.methods import methods
from lrc.moments import collectors
from lrc.plan.resolve import Draft, resolve
from lrc.plan.resolved import ResolvedPlan
from lrc.run.settings import Run


@dataclass(frozen=True)
class Job:
    """A model and a plan resolved for it, from headers alone."""

    model: ResolvedModel
    reader: CheckpointReader
    draft: Draft
    plan: ResolvedPlan

    @property
    def name(self) -> str:
        """``MODEL-PLAN``, the default name of the output folder."""
        return f"{self.model.name}-{self.draft.stem}"


def open_checkpoint(model: str | Path, run: Run) -> tuple[ResolvedModel, CheckpointReader]:
    """Find a model and read its headers. Raises UserError for a missing model."""
    found = resolve_model(str(model), revision=run.revision, allow_pickle=run.allow_pickle)
    return found, CheckpointReader(
        found.path, allow_pickle=run.allow_pickle, trust_remote_code=run.trust_remote_code
    )


def make_job(model: ResolvedModel, reader: CheckpointReader, draft: Draft) -> Job:
    """Resolve a plan for a model. Raises UserError with every mistake of the plan at once."""
    found = resolve(draft, reader.architecture, methods(), collectors())
    return Job(model, reader, draft, replace(found, warnings=(*reader.warnings, *found.warnings)))


def jobs_at_keeps(
    model: ResolvedModel, reader: CheckpointReader, draft: Draft, keeps: Sequence[float]
) -> list[Job]:
    """Return a job for each of ``keeps``, with the plan resolved at that keep instead of its own.

    Sizes outside the layers stay. Raises UserError with every mistake of the plan. A size in the layers is a mistake,
    as an allocation finds these; only ``keep-all`` is allowed.
    """
    found = []
    for keep in keeps:
        kept = replace(draft, plan=draft.plan.model_copy(update={"keep": keep}))
        resolved = resolve(kept, reader.architecture, methods(), collectors(), finder="the allocation")
        if fixed := [a.target for a in resolved.outer if a.target not in resolved.shared]:
            source, names = draft.document.source, " and ".join(fixed)
            unmeasured = f"{source}: the cost of {names} is not measured, so predictions leave it out"
            resolved = replace(resolved, warnings=(*resolved.warnings, unmeasured))
        warnings = (*reader.warnings, *resolved.warnings)
        found.append(Job(model, reader, draft, replace(resolved, warnings=warnings)))
    return found
