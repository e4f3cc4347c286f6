"""Find and read the text that a name or a path stands for."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from lrc.errors import UserError, nearest
from lrc.text.datasets import DATASETS, SYNTHETIC, DataSet, Split
from lrc.text.files import SUFFIXES, holds_rows, read_column, read_plain

ASSETS = Path(__file__).parent.parent / "assets"
DATA_DIR_VARIABLE = "LRC_DATA_DIR"
Use = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Text:
    """Hold one text with the ``sha256`` of its UTF-8 bytes and its caveats for a report.

    ``name`` is the data set's name or the file's path; ``split`` of a file is the column that was named, else None.
    """

    name: str
    split: str | None
    text: str
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Return ``wikitext2:test``, or the file's path with the column that was named."""
        return f"{self.name}:{self.split}" if self.split else self.name


def named_texts(ppl: str | Sequence[str]) -> list[str]:
    """Return one or several names as a list; raise UserError if there are none."""
    found = [ppl] if isinstance(ppl, str) else [*ppl]
    if not found:
        raise UserError("ppl names no text; name one, such as wikitext2, or leave it out")
    return found


def read_text(spec: str, use: Use, data_dir: Path | None = None) -> Text:
    """Read the text that ``NAME``, ``NAME:SPLIT``, a file's path or ``FILE:COLUMN`` stands for.

    Files are plain text, or rows with a column ``text`` as CSV, TSV, JSON or Parquet. Data sets are read from
    ``data_dir`` (default: LRC_DATA_DIR), else from the hub; the default split depends on ``use``. Raises UserError for
    an unknown name, split or column, and a text that is missing, empty or binary.
    """
    name, _, split = spec.partition(":")
    if name in DATASETS:
        folder = data_dir or os.environ.get(DATA_DIR_VARIABLE)
        if folder and not Path(folder).is_dir():
            giver = "--data-dir" if data_dir else DATA_DIR_VARIABLE
            raise UserError(f"{folder}, given by {giver}, is not a folder")
        return _read_dataset(DATASETS[name], split, use, Path(folder) if folder else None)
    path, column = _path(spec, use)
    if holds_rows(path):
        text = "\n\n".join(read_column(path, "text" if column is None else column))
    elif column is None:
        text = read_plain(path)
    else:
        kinds = "CSV, TSV, JSON and Parquet"
        raise UserError(f"{path} is plain text, without a column {column!r}; {kinds} files have columns")
    return _text(spec if column is None else spec[: -1 - len(column)], column, text, str(path), ())


def check_text(spec: str, use: Use) -> None:
    """Raise UserError for an unknown name or split or a missing file, without reading the text."""
    name, _, split = spec.partition(":")
    if name in DATASETS:
        _split(DATASETS[name], split, use)
    elif not (path := _path(spec, use)[0]).exists():
        raise UserError(f"{path}: no such file")


def _path(spec: str, use: Use) -> tuple[Path, str | None]:
    """Return a text file's path and column, or raise UserError for an unknown name that looks like no path.

    The path is the longest part of ``spec``, whole or up to a colon, that is a file.
    """
    name = spec.partition(":")[0]
    if name == SYNTHETIC:
        raise UserError(f"no text {spec!r}: {SYNTHETIC}, which has no splits, is for calibration alone")
    for end in (len(spec), *(colon.start() for colon in reversed([*re.finditer(":", spec)]))):
        if (path := Path(spec[:end]).expanduser()).is_file():
            return path, spec[end + 1 :] if end < len(spec) else None
    path = Path(spec).expanduser()
    if not spec or not (path.exists() or os.sep in spec or Path(name).suffix.lower() in SUFFIXES):
        known = [*DATASETS, SYNTHETIC] if use == "calibration" else DATASETS
        raise UserError(f"unknown text {spec!r}: {nearest(name, known)}; or a path to a text file")
    return path, None


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
    if holds_rows(path):
        return read_column(path, data_set.column, split.documents)
    text = read_plain(path)
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
    return Text(name, split, text, digest, notes)
