"""A model and a plan worked out for it, known before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lrc.checkpoint.reader import CheckpointReader
from lrc.hub.names import ResolvedModel, resolve_model
from lrc.methods import methods
from lrc.moments import collectors
from lrc.plan.library import PlanLike, read_draft
from lrc.plan.resolve import Draft, resolve
from lrc.plan.resolved import ResolvedPlan
from lrc.run.settings import Run


@dataclass(frozen=True)
class Job:
    """A model and a plan worked out for it, from headers alone."""

    model: ResolvedModel
    reader: CheckpointReader
    draft: Draft
    plan: ResolvedPlan

    @property
    def name(self) -> str:
        """``MODEL-PLAN``, the output folder's name unless the user gives one."""
        return f"{self.model.name}-{self.draft.stem}"


def open_checkpoint(model: str | Path, run: Run) -> tuple[ResolvedModel, CheckpointReader]:
    """Find a model and read its headers. Raises UserError for a model that cannot be had."""
    found = resolve_model(str(model), revision=run.revision, allow_pickle=run.allow_pickle)
    return found, CheckpointReader(
        found.path, allow_pickle=run.allow_pickle, trust_remote_code=run.trust_remote_code
    )


def make_job(model: ResolvedModel, reader: CheckpointReader, draft: Draft) -> Job:
    """Work a plan out for a model. Raises UserError with every mistake of the plan at once."""
    return Job(model, reader, draft, resolve(draft, reader.architecture, methods(), collectors()))


def prepare(model: str | Path, plan: PlanLike, run: Run = Run()) -> Job:
    """Find a model and a plan, and work the plan out for the model.

    Raises UserError for a model or plan that cannot be had, and with every mistake of the plan at once.
    """
    draft = read_draft(plan)
    return make_job(*open_checkpoint(model, run), draft)


def templates(
    model: ResolvedModel, reader: CheckpointReader, draft: Draft, keeps: Sequence[float]
) -> list[Job]:
    """Work a plan out at every kept fraction, for an allocation to find its sizes; its own ``keep`` gives way.

    Raises UserError with every mistake of the plan, and where it has sizes in the layers besides what it leaves whole;
    those that it has outside stay as they are.
    """
    found = []
    for keep in keeps:
        resolved = resolve(
            draft.keeping(keep), reader.architecture, methods(), collectors(), finder="the allocation"
        )
        if fixed := [a.target for a in resolved.outer if a.target not in resolved.shared]:
            names = " and ".join(fixed)
            unmeasured = (
                f"{draft.document.source}: what {names} costs is not measured, so predictions leave it out"
            )
            resolved = replace(resolved, warnings=(*resolved.warnings, unmeasured))
        found.append(Job(model, reader, draft, resolved))
    return found
