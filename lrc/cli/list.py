"""``lrc list``: list methods, plans, data sets and other choices."""

from __future__ import annotations

from typing import Annotated

import typer

from lrc.cli.options import AsJson
from lrc.cli.screen import result


def verb(
    group: Annotated[
        str | None,
        typer.Argument(
            help="What to list: methods, allocations, families, kinds, plans, data or models.",
            show_default="the names in every group",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List methods, allocations, families, kinds, plans, data sets or models, each with one line and its source."""
    from lrc.report.tables import catalogue_table, names_table
    from lrc.verbs.list import catalogue

    found = catalogue(group)
    parts = names_table(found) if group is None else [catalogue_table(group, found[group])]
    result({name: [vars(item) for item in items] for name, items in found.items()}, parts, as_json)
