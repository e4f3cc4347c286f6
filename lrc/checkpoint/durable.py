"""Files that are on the disk, whole or not at all, when a call returns: what a power cut must not take."""

from __future__ import annotations

import errno
import os
from pathlib import Path


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
