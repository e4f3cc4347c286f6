"""Compute the SHA-256 of files and tensors; hash a run's source files in the background and refuse changed ones.

A part is finished only once the hashes of all source files are in the journal. A resumed run hashes every file again
before it finishes another part, and a file of another size or time before any work starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from lrc.checkpoint.durable import write_text
from lrc.checkpoint.headers import StoredTensor
from lrc.errors import Resumable

_CHUNK = 2**20
_TENSOR_DIGITS = 32  # enough to find a damaged tensor; the file's full hash protects against forgery
_THREADS = 2  # as fast as most disks; the other cores are for the run
Stamp = list[int]


def file_sha256(path: Path, stop: Event | None = None) -> str:
    """Return the SHA-256 of a file in hexadecimal; raise CancelledError once ``stop`` is set."""
    return _sha256(path, 0, path.stat().st_size, stop)


def tensor_sha256(stored: StoredTensor) -> str:
    """Return the first 32 hexadecimal digits of the SHA-256 of a tensor's stored values."""
    return _sha256(stored.file, stored.offset, stored.bytes)[:_TENSOR_DIGITS]


def _sha256(path: Path, start: int, length: int, stop: Event | None = None) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(_CHUNK, max(length, 1))))
    with path.open("rb", buffering=0) as stream:
        stream.seek(start)
        while length and (count := stream.readinto(buffer[:length])):
            if stop is not None and stop.is_set():
                raise CancelledError
            digest.update(buffer[:count])
            length -= count
    return digest.hexdigest()


@contextmanager
def hashing(files: Iterable[Path], threads: int) -> Iterator[dict[Path, Future[str]]]:
    """Hash files in the background, in the order given; hashing releases the GIL. Leaving the context stops it."""
    stop, pool = Event(), ThreadPoolExecutor(threads, thread_name_prefix="sha256")
    try:
        yield {file: pool.submit(file_sha256, file, stop) for file in files}
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


class Sources:
    """Hold the source files of one run by name, with their hashes in the background and in the ``journal``."""

    def __init__(
        self,
        files: Mapping[str, Path],
        stamps: Mapping[str, Stamp],
        hashes: Mapping[Path, Future[str]],
        journal: Path,
    ) -> None:
        self._files, self._stamps, self._hashes, self._journal = files, dict(stamps), hashes, journal
        self._known: dict[str, str] = {}
        if journal.exists():
            noted = json.loads(journal.read_text(encoding="utf-8"))
            self._known = noted["sha256"]
            for name in sorted({*self._known} ^ {*files}):
                raise _changed(name)
            self._compare({name: self._hash(name) for name in files if noted["stamps"][name] != stamps[name]})

    def settle(self) -> dict[str, str]:
        """Wait until every file is hashed and in the journal; return the hashes by file name.

        Raises Resumable for a file that has changed since this run, or the run that it resumes, began.
        """
        hashes = {name: self._hash(name) for name in self._files}
        stamps = {name: _stamp(file) for name, file in self._files.items()}
        touched = [name for name in stamps if stamps[name] != self._stamps[name]]
        if not self._known:
            for name in touched:  # the hash may be of the old bytes, the tensors of the new ones
                raise _changed(self._files[name])
            write_text(self._journal, json.dumps({"sha256": hashes, "stamps": stamps}, allow_nan=False))
            self._known = hashes
        self._compare(hashes)
        self._compare({name: file_sha256(self._files[name]) for name in touched})
        self._stamps = stamps
        return hashes

    def _hash(self, name: str) -> str:
        with _readable(self._files[name]):
            return self._hashes[self._files[name]].result()

    def _compare(self, hashes: Mapping[str, str]) -> None:
        for name, sha256 in hashes.items():
            if self._known[name] != sha256:
                raise _changed(self._files[name])


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
    with _readable(file):
        status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _changed(file: Path | str) -> Resumable:
    return Resumable(
        f"{file} has changed since the run began; restore it and run the same command again, "
        "or pass --fresh to start over"
    )
