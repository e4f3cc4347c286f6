"""``lrc compare``: several outputs in one table, and in one picture of perplexity against bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lrc.cli.options import AsJson
from lrc.cli.screen import show, show_json, wrote


def compare_outputs(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Output folders of lrc compress.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="FILE",
            help="Write an HTML page with the table and the picture.",
            show_default="none",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put outputs beside each other: size, cache, perplexity, seconds. Nothing is measured anew."""
    from lrc.checkpoint.durable import check_file, write_text, written
    from lrc.report.compared import compared_page
    from lrc.report.outputs import read_outputs
    from lrc.report.tables import outputs

    if out is not None:
        check_file("-o", out)
    sources = read_outputs([folder.expanduser() for folder in folders])
    if out is not None:
        with written(out):
            write_text(out, compared_page(sources))
    if as_json:
        show_json({"sources": [source.as_dict() for source in sources]})
        return
    show(*outputs(sources))
    if out is not None:
        wrote(out)
