"""Find and read the text that a name or a path stands for."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Literal

from lrc.errors import UserError, nearest
from lrc.text.chat import Conversation, read_conversation
from lrc.text.datasets import DATASETS, GENERAL, MESSAGES, SYNTHETIC, DataSet
from lrc.text.files import SUFFIXES, Row, holds_rows, read_plain, read_rows

ASSETS = Path(__file__).parent.parent / "assets"
DATA_DIR_VARIABLE = "LRC_DATA_DIR"
Use = Literal["calibration", "held-out", "evaluation"]


class Missing(UserError):
    """A data set is neither in the data folder nor on the hub; ``reason`` says so in a clause.

    ``unreachable``: the hub did not answer, so that it gives no other text either.
    """

    def __init__(self, message: str, reason: str, *, unreachable: bool) -> None:
        super().__init__(message)
        self.reason, self.unreachable = reason, unreachable


@dataclass(frozen=True)
class Text:
    """Hold one text with the ``sha256`` of its UTF-8 bytes and its caveats for a report.

    ``name`` is the data set's name or the file's path; ``split`` of a file is the column that was named, else None.
    ``origin``: the hub's repository, or the file by its name in the data folder. ``chat``: the conversations, if the
    text is a chat; ``text`` then holds them as JSON lines.
    """

    name: str
    split: str | None
    text: str
    sha256: str
    origin: str
    notes: tuple[str, ...] = ()
    chat: tuple[Conversation, ...] = ()

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

    Files are plain text, or rows as CSV, TSV, JSON or Parquet, with a column of text or of messages. Data sets are
    read from ``data_dir`` (default: LRC_DATA_DIR), else from the hub; the default split depends on ``use``. Raises
    UserError for an unknown name, split or column, a text that is missing, empty or binary, and for a chat to evaluate
    on.
    """
    name, _, split = spec.partition(":")
    if name in DATASETS:
        return _read_dataset(DATASETS[name], split, use, data_folder(data_dir))
    path, column = _path(spec, use)
    if holds_rows(path):
        rows = read_rows(path, column)
    elif column is None:
        rows = [read_plain(path)]
    else:
        kinds = "CSV, TSV, JSON and Parquet"
        raise UserError(f"{path} is plain text, without a column {column!r}; {kinds} files have columns")
    name = spec if column is None else spec[: -1 - len(column)]
    if use == "evaluation" and rows and not isinstance(rows[0], str):
        raise _no_chat(spec)
    return _text(Text(name, column, "", "", path.name), rows, "\n\n", str(path))


def data_folder(data_dir: Path | None) -> Path | None:
    """Return ``data_dir``, by default LRC_DATA_DIR; None if there is neither. Raises UserError if it is no folder."""
    folder = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if folder and not Path(folder).is_dir():
        giver = "--data-dir" if data_dir else DATA_DIR_VARIABLE
        raise UserError(f"{folder}, given by {giver}, is not a folder")
    return Path(folder) if folder else None


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
    if name == GENERAL:
        raise UserError(
            f"no text {spec!r}: {GENERAL}, which has no splits, is a mixture of texts for calibration and held-out "
            "text; name one of its texts"
        )
    for end in (len(spec), *(colon.start() for colon in reversed([*re.finditer(":", spec)]))):
        if (path := Path(spec[:end]).expanduser()).is_file():
            return path, spec[end + 1 :] if end < len(spec) else None
    path = Path(spec).expanduser()
    if not spec or not (path.exists() or os.sep in spec or Path(name).suffix.lower() in SUFFIXES):
        more = {"calibration": [SYNTHETIC, GENERAL], "held-out": [GENERAL], "evaluation": []}
        known = [*DATASETS, *more[use]]
        raise UserError(f"unknown text {spec!r}: {nearest(name, known)}; or a path to a text file")
    return path, None


def _split(data_set: DataSet, asked: str, use: Use) -> str:
    """Return the full name of the split asked for, else the data set's default for the use."""
    name = {"valid": "validation", "val": "validation"}.get(asked, asked)
    held_out = "validation" if "validation" in data_set.splits else data_set.evaluation
    default = {"calibration": data_set.calibration, "held-out": held_out, "evaluation": data_set.evaluation}
    name = name or default[use]
    if name not in data_set.splits:
        raise UserError(f"{data_set.name} has no split {asked!r}: {nearest(name, data_set.splits)}")
    return name


def local_file(data_set: DataSet, asked: str, use: Use, data_dir: Path | None) -> Path | None:
    """Return the file of a split in the data folder, or in the package; None if there is none."""
    folder = ASSETS if data_set.hub is None else data_dir
    files = data_set.splits[_split(data_set, asked, use)].local if folder else ()
    return next((folder / file for file in files if folder and (folder / file).is_file()), None)


def _read_dataset(data_set: DataSet, asked: str, use: Use, data_dir: Path | None) -> Text:
    name = _split(data_set, asked, use)
    if use == "evaluation" and data_set.column == MESSAGES:
        raise _no_chat(data_set.name)
    held_out = use == "calibration" and name == data_set.evaluation
    notes = (f"{data_set.name}: {name} split used for calibration",) if held_out else ()
    if path := local_file(data_set, asked, use, data_dir):
        rows, place = _local_rows(data_set, name, path), str(path)
        folder = data_dir if data_set.hub and data_dir else ASSETS
        origin = path.relative_to(folder).as_posix() + ("" if data_set.hub else " of the package")
    elif data_set.hub:
        rows = _hub_rows(data_set, data_set.hub, name, data_dir)
        place = origin = " ".join(filter(None, [data_set.hub, data_set.config, "on the hub"]))
    else:
        raise UserError(
            f"{ASSETS / data_set.splits[name].local[0]}: missing; the installation of lrc is damaged"
        )
    return _text(Text(data_set.name, name, "", "", origin, notes), rows, data_set.joiner, place)


def _local_rows(data_set: DataSet, name: str, path: Path) -> list[Row]:
    split = data_set.splits[name]
    if holds_rows(path):
        if data_set.stream is None:
            return read_rows(path, None, split.documents)
        rows = read_rows(path)
        first = len(rows) - -(-len(rows) // 10)  # of the validation rows
        return (rows[first:] if split.skip else rows[:first])[: split.documents]
    text = read_plain(path)
    if data_set.lines == "none":
        return [text]
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if data_set.lines == "stripped":
        return [line.strip() for line in lines]
    return [f"{line}\n" if line.strip() else "" for line in lines]


def _hub_rows(data_set: DataSet, hub: str, name: str, data_dir: Path | None) -> list[Row]:
    from datasets import load_dataset

    split = data_set.splits[name]
    try:
        rows = load_dataset(
            hub,
            data_set.config,
            data_files={name: split.hub_file} if split.hub_file else None,
            split=data_set.stream or name,
            revision=data_set.revision,
            streaming=split.documents is not None,
            verification_mode="no_checks",  # one file of many: the sizes on the data set's card do not apply
        )
        end = None if split.documents is None else split.skip + split.documents
        values = [row[data_set.column] for row in islice(rows, split.skip, end)]
    except Exception as error:  # the hub's client, its cache and its transport each raise their own
        searched = f"not in {data_dir}" if data_dir else "no data folder is given"
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise Missing(
            f"no text for {data_set.name}:{name}: {searched}, and the hub does not give {hub} ({reason}). Without a "
            f"network, pass --data-dir or set {DATA_DIR_VARIABLE} to a folder with {' or '.join(split.local)}, "
            "or name a text file or 'builtin'",
            f"there is no local file, and the hub does not give {hub} ({reason})",
            unreachable=isinstance(error, ConnectionError),
        ) from error
    places = (f"{hub}, row {number}" for number in count(split.skip + 1))
    return [
        v if isinstance(v, str) else read_conversation(v, at) for v, at in zip(values, places, strict=False)
    ]


def _no_chat(spec: str) -> UserError:
    return UserError(
        f"{spec} is a chat, which serves as calibration and held-out text alone; measure perplexity on plain text"
    )


def _text(found: Text, rows: Sequence[Row], joiner: str, place: str) -> Text:
    """Return a text with what its rows hold. Raises UserError, which names the ``place``, for no text."""
    chat = tuple(row for row in rows if not isinstance(row, str))
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in chat]
    text = "\n".join(lines) if chat else joiner.join(row for row in rows if isinstance(row, str))
    if not text.strip():
        raise UserError(f"{place} is empty: it holds no text")
    try:
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise UserError(f"{place}: character {error.start} is half of a surrogate pair, not text") from None
    return replace(found, text=text, sha256=digest, chat=chat)
