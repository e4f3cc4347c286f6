"""What a run is about to do, known before any weight is read: model, plan, device, precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lrc.checkpoint.reader import CheckpointReader
from lrc.hub.names import ResolvedModel, resolve_model
from lrc.methods import methods
from lrc.moments import collectors
from lrc.plan.library import find_plan
from lrc.plan.resolve import parse_plan, resolve
from lrc.plan.resolved import ResolvedPlan


@dataclass(frozen=True)
class Job:
    """A model and a plan worked out for it, from headers alone."""

    model: ResolvedModel
    reader: CheckpointReader
    plan_text: str
    plan_source: str
    plan: ResolvedPlan

    @property
    def name(self) -> str:
        """``MODEL-PLAN``, the output folder's name unless the user gives one."""
        return f"{self.model.name}-{Path(self.plan_source).stem}"


def prepare(
    model: str | Path,
    plan: str | Path,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Job:
    """Find a model and a plan, and work the plan out for the model.

    Raises UserError for a model or plan that cannot be had, and with every mistake of the plan at once.
    """
    text, source = find_plan(str(plan))
    draft = parse_plan(text, source)
    found = resolve_model(str(model), revision=revision, allow_pickle=allow_pickle)
    reader = CheckpointReader(found.path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    # A shipped plan goes by its name: where it is installed is nobody's business but this machine's.
    name = str(plan) if Path(plan).is_file() else Path(source).stem
    return Job(found, reader, text, name, resolve(draft, reader.architecture, methods(), collectors()))
