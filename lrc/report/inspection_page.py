"""An inspection as a folder: inspect.json, pictures, and inspect.html with all of them in one file."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lrc.errors import UserError
from lrc.report.inspection import Inspection


def check_folder(folder: Path) -> None:
    """Raise UserError where a folder cannot be written to; nothing is made yet."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} cannot be written: it is a file; name a folder with -o")
    near = folder if folder.is_dir() else folder.absolute().parent
    if not near.is_dir():
        raise UserError(f"{folder} cannot be written: there is no folder {near}")
    try:
        with tempfile.TemporaryFile(dir=near):
            pass  # whether it can be should be known now, not after the work
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None


def write_inspection(found: Inspection, folder: Path) -> list[Path]:
    """Write an inspection into a folder; the files that there are then."""
    folder.mkdir(exist_ok=True)
    path = folder / "inspect.json"
    path.write_text(found.to_json(), encoding="utf-8")
    return [path]
