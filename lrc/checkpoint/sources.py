"""Hash a run's source files in the background and refuse files that change before the run ends.

A part is finished only once the hashes of all source files are in the journal. A resumed run hashes every file again,
in full, before it finishes another part. A file whose size or times have changed is hashed before any work starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from lrc.checkpoint.durable import write_text
from lrc.checkpoint.hashes import file_sha256, hashing
from lrc.errors import Resumable

_THREADS = 2  # as fast as most disks; the other cores are for the run
Stamp = list[int]


class Sources:
    """Hold the source files of one run by name; made by ``watching``."""

    def __init__(
        self,
        files: Mapping[str, Path],
        stamps: dict[str, Stamp],
        hashes: Mapping[Path, Future[str]],
        journal: Path,
    ) -> None:
        self._files, self._stamps, self._hashes, self._journal = files, stamps, hashes, journal
        self._known: dict[str, str] = {}
        if journal.exists():
            noted = json.loads(journal.read_text(encoding="utf-8"))
            self._known = noted["sha256"]
            for name in sorted({*self._known} ^ {*files}):
                raise _changed(name)
            for name, stamp in stamps.items():
                if noted["stamps"][name] != stamp:
                    self._compare(name, self._found(name))

    def settle(self) -> dict[str, str]:
        """Wait until every file is hashed and in the journal; return the hashes by file name.

        Raises Resumable for a file that has changed since this run, or the run that it resumes, began.
        """
        found = {name: self._found(name) for name in self._files}
        touched = {name: stamp for name in found if (stamp := self._stamp(name)) != self._stamps[name]}
        if not self._known:
            for name in touched:  # the hash may be of the old bytes, the tensors of the new ones
                raise _changed(str(self._files[name]))
            write_text(self._journal, json.dumps({"sha256": found, "stamps": self._stamps}))
            self._known = found
        for name, sha256 in found.items():
            self._compare(name, sha256)
        for name, stamp in touched.items():
            self._compare(name, file_sha256(self._files[name]))
            self._stamps[name] = stamp
        return found

    def _found(self, name: str) -> str:
        with _readable(self._files[name]):
            return self._hashes[self._files[name]].result()

    def _stamp(self, name: str) -> Stamp:
        with _readable(self._files[name]):
            return _stamp(self._files[name])

    def _compare(self, name: str, sha256: str) -> None:
        if self._known[name] != sha256:
            raise _changed(str(self._files[name]))


@contextmanager
def watching(folder: Path, files: Iterable[Path], journal: Path) -> Iterator[Sources]:
    """Hash ``files`` of ``folder`` in the background; compare them with ``journal`` if it exists.

    Raises Resumable as ``Sources.settle`` does.
    """
    named = {str(file.relative_to(folder)): file for file in files}
    stamps = {name: _stamp(file) for name, file in named.items()}
    with hashing(named.values(), _THREADS) as hashes:
        yield Sources(named, stamps, hashes, journal)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Resumable(f"{file} cannot be read: {error.strerror}") from error


def _stamp(file: Path) -> Stamp:
    """Return a file's size and its times in nanoseconds, which every write changes."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _changed(what: str) -> Resumable:
    return Resumable(
        f"{what} has changed since the run began; restore it and run the same command again, "
        "or pass --fresh to start over"
    )
