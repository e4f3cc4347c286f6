"""Compute the SHA-256 of files and tensors; several threads help, as hashing releases the GIL."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from lrc.checkpoint.headers import StoredTensor

_CHUNK = 2**20
_TENSOR_DIGITS = 32  # enough to find a damaged tensor; the file's full hash protects against forgery


class Stopped(Exception):
    """Raised in a hashing thread whose result is no longer needed."""


def file_sha256(path: Path, stop: Event | None = None) -> str:
    """Return the SHA-256 of a file in hexadecimal; raise Stopped once ``stop`` is set."""
    return _sha256(path, 0, path.stat().st_size, stop)


def tensor_sha256(stored: StoredTensor) -> str:
    """Return the first 32 hexadecimal digits of the SHA-256 of a tensor's stored values."""
    return _sha256(stored.file, stored.offset, stored.bytes, None)[:_TENSOR_DIGITS]


@contextmanager
def hashing(files: Iterable[Path], threads: int) -> Iterator[dict[Path, Future[str]]]:
    """Hash files in the background, in the order given; leaving the context stops unfinished hashes."""
    stop, pool = Event(), ThreadPoolExecutor(threads, thread_name_prefix="sha256")
    try:
        yield {file: pool.submit(file_sha256, file, stop) for file in files}
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _sha256(path: Path, start: int, length: int, stop: Event | None) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(_CHUNK, max(length, 1))))
    with path.open("rb", buffering=0) as stream:
        stream.seek(start)
        while length and (count := stream.readinto(buffer[:length])):
            if stop is not None and stop.is_set():
                raise Stopped
            digest.update(buffer[:count])
            length -= count
    return digest.hexdigest()
