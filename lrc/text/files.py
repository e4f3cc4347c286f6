"""Read the text of a file: plain, or a column of CSV, TSV, JSON or Parquet, each compressed or not.

Errors name the file and the line, row or byte that cannot be read.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BufferedReader, BytesIO, FileIO, StringIO
from itertools import islice
from pathlib import Path
from typing import IO, Any

from lrc.errors import UserError
from lrc.text.chat import Conversation, read_conversation
from lrc.text.datasets import MESSAGES

Row = str | Conversation
_TEXT = "text"
_MARKS = (  # UTF-32 first: its mark in little-endian order begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _open_zstd(file: IO[bytes], mode: str) -> BufferedReader:
    from pyarrow import CompressedInputStream, PythonFile

    return BufferedReader(CompressedInputStream(PythonFile(file, mode="r"), "zstd"))


_COMPRESSED: dict[str, tuple[bytes, Any]] = {  # the first bytes as a pattern, and what opens the file
    ".gz": (rb"\x1f\x8b\x08", gzip.open),
    ".bz2": (rb"BZh[1-9]1AY&SY", bz2.open),
    ".xz": (rb"\xfd7zXZ\x00", lzma.open),
    ".zst": (rb"\x28\xb5\x2f\xfd", _open_zstd),
}


def read_plain(path: Path) -> str:
    """Read a text file, decompressed; raise UserError if it is binary or cannot be read."""
    with _opened(path) as file:
        return _decode(file.read(), path)


def read_rows(path: Path, column: str | None = None, limit: int | None = None) -> list[Row]:
    """Read ``column`` of the first ``limit`` rows of a file that ``holds_rows``, each value as it is written.

    A row is a text, or a conversation if the column holds messages. The default column is ``text``, else ``messages``.
    Raises UserError if the file cannot be read, has no such column, has no text in it, or holds text and conversations.
    """
    rows = list(islice(_READERS[_form(path)](path, column), limit))
    for number, row in enumerate(rows, 1):
        if isinstance(row, str) != isinstance(rows[0], str):
            raise UserError(f"{path}, row {number}: text and messages in one column; keep them in two files")
    return rows


def holds_rows(path: Path) -> bool:
    """Tell whether a file holds rows with columns rather than plain text."""
    return _form(path) in _READERS


def _form(path: Path) -> str:
    """Return the suffix that says what a file holds, such as ``.csv`` of ``a.csv.gz``."""
    if path.is_file():  # a pipe can be read only once
        with _opened(path) as file:
            if file.peek(4).startswith(b"PAR1"):
                return ".parquet"
    inner = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return inner.suffix.lower()


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Open a file, decompressed as its first bytes say, else as its name says."""
    try:
        with path.open("rb") as raw:
            head = raw.peek(16)
            found = (opened for pattern, opened in _COMPRESSED.values() if re.match(pattern, head))
            by_name = _COMPRESSED.get(path.suffix.lower(), (b"", None))[1]
            if opened := next(found, by_name):
                with opened(raw, "rb") as file:
                    yield file
            else:
                yield raw
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a file in it, or pass --data-dir {path}") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _encoding(head: bytes) -> str:
    return next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")


def _decode(data: bytes, path: Path, line: int = 1, start: int = 0) -> str:
    """Decode ``data``, which begins at byte ``start`` and line ``line`` of the file; drop a byte order mark."""
    encoding = "utf-8" if start else _encoding(data)

    def place(at: int) -> str:
        newlines = data[:at].decode(encoding, "replace").count("\n")
        return f"byte {start + at} (line {line + newlines})"

    nul = data.find(b"\0") if encoding.startswith("utf-8") else -1
    if nul >= 0:
        wide = 4 * data[:64].count(0) > len(data[:64])
        hint = "; is it UTF-16 or UTF-32 without a byte order mark? convert it to UTF-8" if wide else ""
        raise UserError(f"{path} is not a text file: NUL at {place(nul)}{hint}")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        at = len(data) - len(error.object) + error.start  # utf-8-sig counts from the end of its mark
        name = encoding.removesuffix("-sig").upper()
        raise UserError(f"{path} is not {name}: {error.reason} at {place(at)}; convert it to UTF-8") from None


def _table_rows(path: Path, column: str | None, delimiter: str) -> Iterator[str]:
    column = _TEXT if column is None else column
    with _opened(path) as file:
        text = _decode(file.read(), path)
    if not text.strip():
        return
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the default, 128 KiB
    rows = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        header = next(rows)
        if header.count(column) != 1:
            what = "two columns" if column in header else "no column"
            hint = "; line 1 has to name the columns"
            raise UserError(f"{path}: {what} {column!r}; columns: {_listed(header)}{hint}")
        line = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                raise UserError(
                    f"{path}, line {line}: {len(row)} cells, but line 1 names {len(header)} columns "
                    f"({_listed(header)}); a cell with {delimiter!r} or a newline needs quotes"
                )
            if row:
                yield row[header.index(column)]
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: the row's quotes cannot be read: {error}") from None


def _json_rows(path: Path, column: str | None) -> Iterator[Row]:
    with _opened(path) as file:
        if _form(path) == ".json" and re.match(rb"[^{\w]*\[", file.peek(16)):  # after a mark and white space
            for number, row in enumerate(_json(_decode(file.read(), path), f"{path}"), 1):
                yield _json_field(row, column, f"{path}, row {number}")
            return
        for number, line in _lines(file, path):
            if line.strip():
                place = f"{path}, line {number}"
                yield _json_field(_json(line, place), column, place)


def _lines(file: BufferedReader, path: Path) -> Iterator[tuple[int, str]]:
    """Yield a file's lines by number, read one at a time if they are UTF-8."""
    if _encoding(file.peek(4)).startswith("utf-8"):
        start = 0
        for number, raw in enumerate(file, 1):
            yield number, _decode(raw, path, number, start)
            start += len(raw)
    else:
        yield from enumerate(_decode(file.read(), path).split("\n"), 1)


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise UserError(f"{place}: not JSON: {error.msg} at {where}column {error.colno}") from None


def _json_field(row: object, column: str | None, place: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(
            f"{place}: expected an object with a field {column or _TEXT!r}, found {type(row).__name__}"
        )
    column = _default(row) if column is None else column
    value = row.get(column)
    if isinstance(value, list):
        return read_conversation(value, f"{place}, field {column!r}")
    if not isinstance(value, str):
        raise UserError(f"{place}: no text in field {column!r}; fields: {_listed(sorted(row))}")
    return value


def _default(names: Collection[str]) -> str:
    """Return the column that is read of a row with these names if the user names none."""
    return MESSAGES if MESSAGES in names and _TEXT not in names else _TEXT


def _parquet_rows(path: Path, column: str | None) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with _opened(path) as file:
        try:
            plain = isinstance(getattr(file, "raw", None), FileIO)
            table = ParquetFile(file if plain else BytesIO(file.read()))  # which begins to read at the end
            names = table.schema_arrow.names
            column = _default(names) if column is None else column
            if column not in names:
                raise UserError(f"{path}: no column {column!r}; columns: {_listed(names)}")
            number = 0
            for batch in table.iter_batches(columns=[column]):
                for value in batch[column].to_pylist():
                    number += 1
                    if isinstance(value, list):
                        value = read_conversation(value, f"{path}, row {number}")
                    elif not isinstance(value, str):
                        held = "null" if value is None else str(batch[column].type)
                        raise UserError(f"{path}, row {number}: no text in column {column!r}: it is {held}")
                    yield value
        except ArrowException as error:
            raise UserError(f"{path} cannot be read as parquet: {error}") from error


def _listed(names: Sequence[str]) -> str:
    """Return the names of columns; cells of a file without a header may be long."""
    return ", ".join(name if len(name) <= 40 else f"{name[:39]}…" for name in names) or "none"


_READERS = {
    ".csv": partial(_table_rows, delimiter=","),
    ".tsv": partial(_table_rows, delimiter="\t"),
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}
SUFFIXES = (".txt", ".raw", ".md", *_READERS, *_COMPRESSED)  # of names that are surely files
