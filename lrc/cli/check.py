"""``lrc check``: sizes, bytes and memory that a plan gives for a model, from headers alone."""

from __future__ import annotations

from lrc.cli.options import AsJson, Model, PlanOptions, Source, running
from lrc.cli.screen import result


def verb(model: Model, plan: PlanOptions, source: Source, as_json: AsJson = False) -> None:
    """Resolve a plan against MODEL: ranks, parameters, bytes, GPU memory. No weight is loaded."""
    from lrc.plan.job import make_job, open_checkpoint
    from lrc.plan.library import find_draft
    from lrc.report.tables import check_tables
    from lrc.verbs.check import check

    draft = find_draft(**vars(plan))
    with running(source, split=False) as run:
        found = check(make_job(*open_checkpoint(model, run), draft))
    result(found, check_tables(found), as_json)
