"""Write files so that they are on the disk, whole, when a call returns: a power cut cannot damage them."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lrc.errors import OutOfResources, UserError


def check_file(option: str, path: Path) -> None:
    """Raise UserError if no file can be written at ``path``, given by ``option``; call it before the work."""
    failure = f"{option} {path} cannot be written"
    if not path.parent.is_dir():
        raise UserError(f"{failure}: there is no folder {path.parent}")
    if path.is_dir():
        raise UserError(f"{failure}: it is a folder")
    if path.exists() and not path.is_file():  # a device or a pipe, which a file would replace
        raise UserError(f"{failure}: it is no regular file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{failure}: {error.strerror or error}") from None


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Raise OutOfResources if writing a file fails."""
    try:
        yield
    except OSError as error:
        raise OutOfResources(f"{path} cannot be written: {error.strerror or error}") from error


def write_file(path: Path, text: str) -> None:
    """Write a text file as ``write_text`` does; raise OutOfResources if that fails."""
    with written(path):
        write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears under its name only when whole."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    put(partial, path)


def put(partial: Path, path: Path) -> None:
    """Rename a synced file to its final name in the same folder; replace any file of that name."""
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise  # some network file systems refuse fsync on folders, but write them through
    finally:
        os.close(descriptor)
