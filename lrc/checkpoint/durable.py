"""Files that are on the disk, whole or not at all, when a call returns: what a power cut must not take."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lrc.errors import OutOfResources, UserError


def check_file(option: str, path: Path) -> None:
    """Raise UserError where no file can be written in place of ``path``, which an ``option`` names; nothing is made.

    Called before the work, so that this is not known after it.
    """
    told = f"{option} {path} cannot be written"
    if not path.parent.is_dir():
        raise UserError(f"{told}: there is no folder {path.parent}")
    if path.is_dir():
        raise UserError(f"{told}: it is a folder")
    if path.exists() and not path.is_file():  # a device or a pipe, in whose place a file would be put
        raise UserError(f"{told}: it is no regular file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{told}: {error.strerror or error}") from None


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Tell a file that cannot be written after all as OutOfResources."""
    try:
        yield
    except OSError as error:
        raise OutOfResources(f"{path} cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    put(partial, path)


def put(partial: Path, path: Path) -> None:
    """Give a file that is on the disk its name, in the same folder, in place of any other."""
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise  # some network file systems write folders through and refuse to be asked
    finally:
        os.close(descriptor)
