"""``lrc check``: show the sizes, bytes and memory that a plan gives for a model, from headers alone."""

from __future__ import annotations

from lrc.cli.options import AsJson, Model, PlanOptions, Source, running
from lrc.cli.screen import result


def verb(model: Model, plan: PlanOptions, source: Source, as_json: AsJson = False) -> None:
    """Show the ranks, parameters, bytes and GPU memory that a plan gives for MODEL. No weights are loaded."""
    from lrc.report.tables import check_tables
    from lrc.verbs.check import check

    with running(source, split=False) as run:
        found = check(model, **vars(plan), run=run)
    result(found, check_tables(found), as_json)
