"""``lrc check``: what a plan comes to for a model, from headers alone; without a plan, whether an output is sound."""

from __future__ import annotations

from pathlib import Path

from lrc.cli.options import AsJson, Model, PlanOptions, Source, running
from lrc.cli.screen import progress, quiet, show, show_json
from lrc.errors import UserError


def check_model(
    model: Model,
    plan: PlanOptions,
    source: Source,
    as_json: AsJson = False,
) -> None:
    """Resolve a plan against MODEL: ranks, parameters, bytes, GPU memory. No weight is loaded.

    Without either, verify the folder of an lrc output by the hashes in its lrc.json: file by file, tensor by tensor.
    """
    quiet()
    if plan == PlanOptions():
        _verify(model, trust_remote_code=source.trust_remote_code, as_json=as_json)
        return
    from lrc.plan.job import make_job, open_checkpoint
    from lrc.plan.library import find_draft
    from lrc.report.tables import resolution
    from lrc.verbs.check import check

    draft = find_draft(plan.plan, plan.keep, plan.changes)
    with running(source, split=False) as run:
        found = check(make_job(*open_checkpoint(model, run), draft))
    if as_json:
        show_json(found)
    else:
        show(*resolution(found))


def _verify(model: str, *, trust_remote_code: bool, as_json: bool) -> None:
    """Show that an output is sound; the damage of one that is not is a mistake to be told."""
    from lrc.checkpoint.staging import MANIFEST
    from lrc.report.tables import integrity
    from lrc.verbs.verify import verify

    folder = Path(model).expanduser()
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{model} is no folder of an lrc output (with {MANIFEST}), which lrc check would verify; "
            "to see what a plan comes to for a model, pass --plan, such as --plan a3-2x"
        )
    with progress() as track:
        found = verify(folder, trust_remote_code=trust_remote_code, progress=track)
    if as_json:
        show_json(found)
    if not found.sound:
        raise UserError(found.message)
    if not as_json:
        show(*integrity(found))
