from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from threading import Event

import pytest

from lrc.checkpoint import hashes as module
from lrc.checkpoint.hashes import file_sha256, hashing, watching
from lrc.errors import Resumable


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of two files, longer than what is read at once."""
    (tmp_path / "m").mkdir()
    for name in ("one", "two"):
        (tmp_path / "m" / name).write_bytes(name.encode() * 2**19)
    return tmp_path / "m"


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "sources.json"


def flip(file: Path, at: int, *, times: bool = True) -> None:
    """Change one byte, and leave the times as they were unless ``times``."""
    status, data = file.stat(), bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    if not times:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def run(model: Path, journal: Path, then: Callable[[], object] = lambda: None) -> dict[str, str]:
    """A run that finishes something, has ``then`` happen and finishes something more."""
    with watching(model, sorted(model.iterdir()), journal) as sources:
        sources.settle()
        then()
        return sources.settle()


def test_the_hashes_are_those_of_the_files(model, journal):
    found = run(model, journal)
    assert found == {n: hashlib.sha256((model / n).read_bytes()).hexdigest() for n in ("one", "two")}
    assert run(model, journal) == found


@pytest.mark.parametrize("times", [True, False])
@pytest.mark.parametrize("at", [0, 777_777, 3 * 2**19 - 1])
def test_a_byte_that_changed_since_an_earlier_run_is_told(model, journal, at, times):
    run(model, journal)
    flip(model / "two", at, times=times)
    with pytest.raises(Resumable, match=r"two has changed.*--fresh"):
        run(model, journal)
    flip(model / "two", at)
    run(model, journal)


def test_a_change_that_no_time_tells_of_is_told_before_anything_more_is_finished(model, journal, monkeypatch):
    monkeypatch.setattr(module, "_stamp", lambda file: [])
    run(model, journal)
    flip(model / "one", 5)
    told = pytest.raises(Resumable, match="one has changed")
    with watching(model, sorted(model.iterdir()), journal) as sources, told:
        sources.settle()


def test_a_change_while_a_run_goes_on_is_told(model, journal):
    with pytest.raises(Resumable, match="one has changed"):
        run(model, journal, lambda: flip(model / "one", 9))
    with pytest.raises(Resumable, match="one has changed"):
        run(model, journal)


def test_a_change_before_the_first_part_is_finished_is_told(model, journal):
    with watching(model, sorted(model.iterdir()), journal) as sources:
        flip(model / "one", 9)
        with pytest.raises(Resumable, match="one has changed"):
            sources.settle()
    assert not journal.exists()


def test_a_file_that_was_only_touched_is_the_same(model, journal):
    found = run(model, journal, lambda: os.utime(model / "one"))
    os.utime(model / "two")
    assert run(model, journal) == found


def test_files_that_came_or_went_are_told(model, journal):
    run(model, journal)
    (model / "three").touch()
    with pytest.raises(Resumable, match="three has changed"):
        run(model, journal)
    (model / "three").unlink()
    (model / "two").unlink()
    with pytest.raises(Resumable, match="two has changed"):
        run(model, journal)


def test_a_file_that_goes_while_a_run_goes_on_is_told(model, journal):
    with pytest.raises(Resumable, match="one cannot be read: No such file"):
        run(model, journal, (model / "one").unlink)


def test_the_journal_is_there_before_anything_counts(model, journal):
    with watching(model, sorted(model.iterdir()), journal) as sources:
        assert not journal.exists()
        found = sources.settle()
        assert json.loads(journal.read_text())["sha256"] == found


def test_nobody_waits_for_hashes_that_are_not_wanted_any_more(model, monkeypatch):
    started = Event()

    def endless(path: Path, stop: Event) -> str:
        started.set()
        assert stop.wait(60)
        return file_sha256(path, stop)

    monkeypatch.setattr(module, "file_sha256", endless)
    with hashing([model / "one", model / "two"], threads=1) as found:
        assert started.wait(60)
    with pytest.raises(CancelledError):
        found[model / "one"].result()
    assert found[model / "two"].cancelled()
