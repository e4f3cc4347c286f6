"""A model and a plan resolved for it, before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lrc.checkpoint.reader import CheckpointReader
from lrc.hub.names import ResolvedModel, default_calibration, dequantized, resolve_model
from lrc.methods import methods
from lrc.moments import collectors
from lrc.plan.resolve import Draft, resolve
from lrc.plan.resolved import ResolvedPlan
from lrc.run.settings import Run
from lrc.text.mixture import DataLike, read_mixture

GENERAL_SAMPLES = {"samples": 256, "gradient_samples": 64}  # defaults of the mixture ``general``


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
    """Find a model, in full precision, and read its headers. Raises UserError for a missing model."""
    named = resolve_model(str(model), revision=run.revision, allow_pickle=run.allow_pickle)
    found = dequantized(named, allow_pickle=run.allow_pickle, trust_remote_code=run.trust_remote_code)
    reader = CheckpointReader(
        found.path, allow_pickle=run.allow_pickle, trust_remote_code=run.trust_remote_code
    )
    reader.warnings += [found.note] if found.note else []
    return found, reader


def make_job(
    model: ResolvedModel, reader: CheckpointReader, draft: Draft, calib: DataLike | None = None
) -> Job:
    """Resolve a plan for a model; ``calib``: calibration texts instead of the plan's.

    Raises UserError with every mistake of the plan at once.
    """
    found = resolve(draft, reader.architecture, methods(), collectors())
    return _job(model, reader, draft, found, calib)


def jobs_at_keeps(
    model: ResolvedModel,
    reader: CheckpointReader,
    draft: Draft,
    keeps: Sequence[float],
    calib: DataLike | None = None,
) -> list[Job]:
    """Return a job for each of ``keeps``, with the plan resolved at that keep instead of its own.

    ``calib`` as for ``make_job``. Sizes outside the layers stay. Raises UserError with every mistake of the plan. A
    size in the layers is a mistake, as an allocation finds these; only ``keep-all`` is allowed.
    """
    found = []
    for keep in keeps:
        kept = replace(draft, plan=draft.plan.model_copy(update={"keep": keep}))
        resolved = resolve(kept, reader.architecture, methods(), collectors(), finder="the allocation")
        if fixed := [a.target for a in resolved.outer if a.target not in resolved.shared]:
            source, names = draft.document.source, " and ".join(fixed)
            unmeasured = f"{source}: the cost of {names} is not measured, so predictions leave it out"
            resolved = replace(resolved, warnings=(*resolved.warnings, unmeasured))
        found.append(_job(model, reader, draft, resolved, calib))
    return found


def _job(
    model: ResolvedModel, reader: CheckpointReader, draft: Draft, found: ResolvedPlan, calib: DataLike | None
) -> Job:
    """Return a job whose plan names its calibration texts: ``calib``, else the plan's, else the model's default."""
    settings = found.plan.calibration
    planned = settings.data or default_calibration(model.source)
    mixture = read_mixture(planned if calib is None else calib)
    more = GENERAL_SAMPLES if mixture.general else {}
    update = {"data": mixture.data} | {k: v for k, v in more.items() if k not in settings.model_fields_set}
    plan = found.plan.model_copy(update={"calibration": settings.model_copy(update=update)})
    return Job(model, reader, draft, replace(found, plan=plan, warnings=(*reader.warnings, *found.warnings)))
