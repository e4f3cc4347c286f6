"""Files to be written: what is in the way is told before the work, by the option that named the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lrc.checkpoint.durable import check_file, write_text, written
from lrc.errors import OutOfResources, UserError


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        check_file("-o", path)
    return str(error.value)


def test_what_is_in_the_way_is_told_by_the_option(tmp_path: Path) -> None:
    nowhere = tmp_path / "no" / "file"
    assert refused(nowhere) == f"-o {nowhere} cannot be written: there is no folder {tmp_path / 'no'}"
    assert refused(tmp_path) == f"-o {tmp_path} cannot be written: it is a folder"
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe").endswith("it is no regular file")
    assert refused(Path("/proc/file")).startswith("-o /proc/file cannot be written: ")


def test_what_can_be_written_is_not_made_yet(tmp_path: Path) -> None:
    check_file("-o", tmp_path / "file")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "file").write_text("earlier")
    check_file("-o", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "earlier"


def test_what_fails_after_all_is_told(tmp_path: Path) -> None:
    path = tmp_path / "no" / "file"
    with pytest.raises(OutOfResources, match="cannot be written: No such file or directory"), written(path):
        write_text(path, "text")
