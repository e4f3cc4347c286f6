"""Find and read the text that a name or a path stands for: plain, JSON lines or Parquet, compressed or not.

Errors name the file, and the line and byte where text cannot be read.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Literal

from lrc.errors import UserError, nearest
from lrc.text.datasets import DATASETS, SYNTHETIC, DataSet, Split

ASSETS = Path(__file__).parent.parent / "assets"
DATA_DIR_VARIABLE = "LRC_DATA_DIR"
Use = Literal["calibration", "evaluation"]

_OPENERS = {".xz": lzma.open, ".gz": gzip.open}
_FILE_SUFFIXES = (".txt", ".raw", ".md", ".jsonl", ".json", ".parquet", ".xz", ".gz")


@dataclass(frozen=True)
class Text:
    """Hold one text with the ``sha256`` of its UTF-8 bytes and its caveats for a report.

    ``name`` is the data set's name or the file's path; ``split`` is None for a file.
    """

    name: str
    split: str | None
    text: str
    sha256: str
    origin: str
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Return ``wikitext2:test``, or the file's path."""
        return f"{self.name}:{self.split}" if self.split else self.name


def named_texts(ppl: str | Sequence[str]) -> list[str]:
    """Return one or several names as a list; raise UserError if there are none."""
    found = [ppl] if isinstance(ppl, str) else [*ppl]
    if not found:
        raise UserError("ppl names no text; name one, such as wikitext2, or leave it out")
    return found


def read_text(spec: str, use: Use, data_dir: Path | None = None) -> Text:
    """Read the text that ``NAME``, ``NAME:SPLIT`` or a file's path stands for.

    Files are plain text, or JSON lines or Parquet with a field ``text``, also as ``.xz`` or ``.gz``. Data sets are read
    from ``data_dir`` (default: LRC_DATA_DIR), else from the hub; the default split depends on ``use``. Raises UserError
    for an unknown name or split, and a text that is missing, empty, binary or not UTF-8.
    """
    name, _, split = spec.partition(":")
    if name in DATASETS:
        folder = data_dir or os.environ.get(DATA_DIR_VARIABLE)
        if folder and not Path(folder).is_dir():
            giver = "--data-dir" if data_dir else DATA_DIR_VARIABLE
            raise UserError(f"{folder}, given by {giver}, is not a folder")
        return _read_dataset(DATASETS[name], split, use, Path(folder) if folder else None)
    path = _path(spec, use)
    text = "\n\n".join(_read_documents(path, "text")) if _holds_documents(path) else _read_plain(path)
    return _text(spec, None, text, str(path), ())


def check_text(spec: str, use: Use) -> None:
    """Raise UserError for an unknown name or split or a missing file, without reading the text."""
    name, _, split = spec.partition(":")
    if name in DATASETS:
        _split(DATASETS[name], split, use)
    elif not (path := _path(spec, use)).exists():
        raise UserError(f"{path}: no such file")


def _path(spec: str, use: Use) -> Path:
    """Return the path of a text file; raise UserError for an unknown name that looks like no path."""
    name = spec.partition(":")[0]
    if name == SYNTHETIC:
        raise UserError(f"no text {spec!r}: {SYNTHETIC}, which has no splits, is for calibration alone")
    path = Path(spec).expanduser()
    if not spec or not (path.exists() or os.sep in spec or path.suffix in _FILE_SUFFIXES):
        known = [*DATASETS, SYNTHETIC] if use == "calibration" else DATASETS
        raise UserError(f"unknown text {spec!r}: {nearest(name, known)}; or a path to a text file")
    return path


def _split(data_set: DataSet, asked: str, use: Use) -> str:
    """Return the full name of the split asked for, else the data set's default for the use."""
    name = {"valid": "validation", "val": "validation"}.get(asked, asked)
    name = name or (data_set.calibration if use == "calibration" else data_set.evaluation)
    if name not in data_set.splits:
        raise UserError(f"{data_set.name} has no split {asked!r}: {nearest(name, data_set.splits)}")
    return name


def _read_dataset(data_set: DataSet, asked: str, use: Use, data_dir: Path | None) -> Text:
    name = _split(data_set, asked, use)
    split = data_set.splits[name]
    held_out = use == "calibration" and name == data_set.evaluation
    notes = (f"{data_set.name}: {name} split used for calibration",) if held_out else ()
    folder = ASSETS if data_set.hub is None else data_dir
    candidates = [folder / file for file in split.local] if folder else []
    if found := next((path for path in candidates if path.is_file()), None):
        rows, origin = _local_rows(data_set, split, found), str(found)
    elif data_set.hub:
        rows, origin = _hub_rows(data_set, data_set.hub, name, data_dir), f"{data_set.hub} on the hub"
    else:
        raise UserError(f"{ASSETS / split.local[0]}: missing; the installation of lrc is damaged")
    return _text(data_set.name, name, data_set.joiner.join(rows), origin, notes)


def _local_rows(data_set: DataSet, split: Split, path: Path) -> list[str]:
    if _holds_documents(path):
        return _read_documents(path, data_set.column, split.documents)
    text = _read_plain(path)
    if data_set.lines == "none":
        return [text]
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if data_set.lines == "stripped":
        return [line.strip() for line in lines]
    return [f"{line}\n" if line.strip() else "" for line in lines]


def _hub_rows(data_set: DataSet, hub: str, name: str, data_dir: Path | None) -> list[str]:
    from datasets import load_dataset

    split = data_set.splits[name]
    try:
        rows = load_dataset(
            hub,
            data_set.config,
            data_files={name: split.hub_file} if split.hub_file else None,
            split=name,
            revision=data_set.revision,
            streaming=split.documents is not None,
            verification_mode="no_checks",  # one file of many: the sizes on the data set's card do not apply
        )
        return [row[data_set.column] for row in islice(rows, split.documents)]
    except Exception as error:  # the hub's client, its cache and its transport each raise their own
        searched = f"not in {data_dir}" if data_dir else "no data folder is given"
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"no text for {data_set.name}:{name}: {searched}, and the hub does not give {hub} ({reason}). Without a "
            f"network, pass --data-dir or set {DATA_DIR_VARIABLE} to a folder with {' or '.join(split.local)}, "
            "or name a text file or 'builtin'"
        ) from error


def _text(name: str, split: str | None, text: str, origin: str, notes: tuple[str, ...]) -> Text:
    if not text.strip():
        raise UserError(f"{origin} is empty: it holds no text")
    try:
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise UserError(f"{origin}: character {error.start} is half of a surrogate pair, not text") from None
    return Text(name, split, text, digest, origin, notes)


def _read_plain(path: Path) -> str:
    """Read a UTF-8 text file, ``.xz`` and ``.gz`` decompressed; raise UserError if it is binary or cannot be read."""
    with _opened(path) as file:
        return _decode(file.read(), path)


def _read_documents(path: Path, column: str, limit: int | None = None) -> list[str]:
    """Read ``column`` of the first ``limit`` rows of a JSON-lines or Parquet file.

    Raises UserError if the file cannot be read, and for a line that is not JSON or has no text in ``column``.
    """
    rows = _parquet_rows if path.suffix == ".parquet" else _json_rows
    return list(islice(rows(path, column), limit))


def _holds_documents(path: Path) -> bool:
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
