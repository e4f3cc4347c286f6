"""``lrc compare``: show several outputs in one table, and in one picture of perplexity against bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lrc.cli.options import AsJson, out_option
from lrc.cli.screen import result


def verb(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR", help="Output folders of lrc compress.")],
    out: Annotated[Path | None, out_option("Write an HTML page with the table and a picture.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the size, cache, perplexity and seconds of outputs. Nothing is measured again."""
    from lrc.checkpoint.durable import check_file, write_file
    from lrc.report.outputs import compared_page, outputs_tables, read_outputs

    if out is not None:
        check_file("-o", out)
    originals = read_outputs([folder.expanduser() for folder in folders])
    if out is not None:
        write_file(out, compared_page(originals))
    result({"sources": [each.as_dict() for each in originals]}, outputs_tables(originals), as_json, out)
