"""Read one text file: plain, JSON lines or Parquet, compressed or not; errors name the line and byte."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO

from lrc.errors import UserError

_OPENERS = {".xz": lzma.open, ".gz": gzip.open}


def read_plain(path: Path) -> str:
    """Read a UTF-8 text file, ``.xz`` and ``.gz`` decompressed; raise UserError if it is binary or cannot be read."""
    with _opened(path) as file:
        return _decode(file.read(), path)


def read_documents(path: Path, column: str, limit: int | None = None) -> list[str]:
    """Read ``column`` of the first ``limit`` rows of a JSON-lines or Parquet file.

    Raises UserError if the file cannot be read, and for a line that is not JSON or has no text in ``column``.
    """
    rows = _parquet_rows if path.suffix == ".parquet" else _json_rows
    return list(islice(rows(path, column), limit))


def holds_documents(path: Path) -> bool:
    """Tell by a file's name whether it holds rows rather than plain text."""
    inner = path.with_suffix("") if path.suffix in _OPENERS else path
    return inner.suffix in (".jsonl", ".json", ".parquet")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a file in it, or pass --data-dir {path}") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _decode(data: bytes, path: Path, line: int = 1, start: int = 0) -> str:
    """Decode ``data``, which begins at byte ``start`` and line ``line`` of the file."""

    def place(at: int) -> str:
        newlines = data.count(b"\n", 0, at)
        return f"byte {start + at} (line {line + newlines})"

    nul = data.find(b"\0")
    if nul >= 0:
        raise UserError(f"{path} is not a text file: NUL at {place(nul)}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason} at {place(error.start)}") from None


def _json_rows(path: Path, column: str) -> Iterator[str]:
    start = 0
    with _opened(path) as file:
        for number, raw in enumerate(file, 1):
            line = _decode(raw, path, number, start)
            start += len(raw)
            if line.strip():
                yield _json_field(line, column, f"{path}, line {number}")


def _json_field(line: str, column: str, place: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object with a field {column!r}, found {type(row).__name__}")
    if not isinstance(row.get(column), str):
        raise UserError(f"{place}: no text in field {column!r}; fields: {', '.join(sorted(row)) or 'none'}")
    return row[column]


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with _opened(path) as file:
        try:
            table = ParquetFile(file)
            names = table.schema_arrow.names
            if column not in names:
                raise UserError(f"{path}: no column {column!r}; columns: {', '.join(names)}")
            for batch in table.iter_batches(columns=[column]):
                yield from batch[column].to_pylist()
        except ArrowException as error:
            raise UserError(f"{path} cannot be read as parquet: {error}") from error
