"""``lrc verify``: check that an output folder is as lrc wrote it."""

from __future__ import annotations

from typing import Annotated

import typer

from lrc.cli.options import AsJson
from lrc.cli.progress import progress
from lrc.cli.screen import result
from lrc.errors import UserError


def verb(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of an lrc output.")],
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Verify the output in DIR by the hashes in its lrc.json, file by file and tensor by tensor."""
    from lrc.verbs.verify import verify

    with progress() as track:
        found = verify(folder, trust_remote_code=trust_remote_code, progress=track)
    if found.sound or as_json:
        result(found, [found.message], as_json)
    if not found.sound:
        raise UserError(found.message)
