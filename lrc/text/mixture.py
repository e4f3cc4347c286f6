"""Draw calibration blocks from several sources in proportion to their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lrc.errors import UserError, as_text_number
from lrc.text.blocks import calibration_blocks, ids_sha256, tokenize, windows
from lrc.text.datasets import SYNTHETIC
from lrc.text.source import check_text, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Data = str | tuple[str, ...] | dict[str, float]
DataLike = str | Sequence[str] | Mapping[str, float]  # accepted from callers as Data


@dataclass(frozen=True)
class Source:
    """Hold the blocks (n, tokens) of one source; ``provenance`` identifies its text, as JSON values."""

    label: str
    blocks: Tensor
    provenance: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """Hold the calibration ``blocks`` (samples, tokens) of all sources; ``weights`` is None if none were given.

    Each block is of one source. Sources are interleaved evenly, each in the order of its text, so that any run of
    blocks has about the proportions of the whole.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...] | None
    blocks: Tensor

    @property
    def data(self) -> Data:
        """Return the texts as a plan writes them, with explicit splits."""
        labels = tuple(source.label for source in self.sources)
        if self.weights is not None:
            return dict(zip(labels, self.weights, strict=True))
        return labels if labels[1:] else labels[0]

    @property
    def label(self) -> str:
        """Return the texts as the command line writes them: ``wikitext2:train=2,c4:train=1``."""
        return _label([source.label for source in self.sources], self.weights)

    @property
    def notes(self) -> list[str]:
        return [note for source in self.sources for note in source.notes]

    def as_dict(self, seed: int) -> dict[str, Any]:
        """Return the output's record of the blocks, which were drawn with ``seed``."""
        samples, seq_len = self.blocks.shape
        weights = [{"weight": w} for w in self.weights or ()] or [{}] * len(self.sources)
        return {
            "data": self.label,
            "samples": samples,
            "seq_len": seq_len,
            "seed": seed,
            "sources": [
                {"data": source.label, **weight, "blocks": len(source.blocks), **source.provenance}
                for source, weight in zip(self.sources, weights, strict=True)
            ],
            "ids_sha256": ids_sha256(self.blocks),
        }


@dataclass(frozen=True)
class Mixture:
    """Hold sources by name, as ``read_text`` takes them or ``synthetic``, and their ``weights``, if any."""

    names: tuple[str, ...]
    weights: tuple[float, ...] | None

    def check(self, samples: int | Literal["all"]) -> None:
        """Raise UserError for an unknown source, and for ``samples`` that no texts of these sources could give."""
        if samples == "all" and SYNTHETIC in self.names:
            raise UserError(
                "samples: all is not possible with synthetic text; give a number, such as samples: 128"
            )
        if samples != "all" and samples < len(self.names):
            raise UserError(
                f"samples: {samples} is less than one block for each of {len(self.names)} sources "
                f"({', '.join(self.names)}); use {len(self.names)} or more"
            )
        for name in self.names:
            if name != SYNTHETIC:
                check_text(name, "calibration")

    def draw(
        self,
        tokenizer: PreTrainedTokenizerBase,
        samples: int | Literal["all"],
        seq_len: int,
        seed: int,
        data_dir: Path | None,
        generate: Callable[[int], Source],
        rows: int | None = None,
    ) -> Calibration:
        """Draw ``samples`` blocks of ``seq_len`` tokens, split by ``shares``, each source without replacement.

        ``all`` takes every block of every source; with weights, as many as the scarcest source allows in proportion.
        ``generate`` makes the blocks of synthetic text and is called last. Raises UserError as ``check`` does, for a
        text that cannot be read or is named twice, for an id beyond the ``rows`` of the embedding, and for too few
        blocks.
        """
        self.check(samples)
        texts = [read_text(n, "calibration", data_dir) if n != SYNTHETIC else None for n in self.names]
        first: dict[str, str] = {}
        for name, text in zip(self.names, texts, strict=True):
            if text and (other := first.setdefault(text.sha256, name)) != name:
                raise UserError(f"calibration on {other} and {name}: they are the same text; name it once")
        labels = [text.label if text else SYNTHETIC for text in texts]
        ids: list[Tensor | None] = []
        room: list[int | None] = []
        for label, text in zip(labels, texts, strict=True):
            with about(f"calibration on {label}"):
                ids.append(each := tokenize(tokenizer, text.text, rows) if text else None)
                room.append(None if each is None else len(windows(each, seq_len)))
        counts = self._counts(labels, samples, room)
        found: dict[str, Source] = {}
        for text, each, count in zip(texts, ids, counts, strict=True):
            if text is not None and each is not None:
                with about(f"calibration on {text.label}"):
                    blocks = calibration_blocks(each, count, seq_len, seed)
                found[text.label] = Source(text.label, blocks, {"text_sha256": text.sha256}, text.notes)
        if SYNTHETIC in labels:
            found[SYNTHETIC] = generate(counts[labels.index(SYNTHETIC)])
        sources = tuple(found[label] for label in labels)
        return Calibration(sources, self.weights, interleaved([source.blocks for source in sources]))

    def _counts(
        self, labels: Sequence[str], samples: int | Literal["all"], room: Sequence[int | None]
    ) -> list[int]:
        """Return the blocks to draw of each source; ``room`` is what each has, None without a limit."""
        weights = [Fraction(str(weight)) for weight in self.weights or [1] * len(labels)]
        if samples == "all":
            full = [blocks or 0 for blocks in room]
            return full if self.weights is None else shares(_most(weights, room, sum(full)), weights)
        counts = shares(samples, weights)
        short = [i for i, blocks in enumerate(room) if blocks is not None and blocks < counts[i]]
        if short and labels[1:]:  # for a single text the draw has a better message
            lacking = [
                f"{labels[i]} has {room[i]} blocks, fewer than the {counts[i]} of its share" for i in short
            ]
            raise UserError(
                f"calibration on {_label(labels, self.weights)}: {'; '.join(lacking)}; use at most samples: "
                f"{_most(weights, room, samples)}, other weights or a longer text"
            )
        return counts


def read_mixture(data: DataLike) -> Mixture:
    """Parse calibration texts: a string as on the command line, a list of names, or a mapping from names to weights.

    In a string, commas separate sources, and the last ``=`` of a source precedes its weight. A string, or a part, that
    is the name of a file is that file. Raises UserError for a source named twice, weights on only some sources, and a
    weight that is not a number above 0.
    """
    try:
        checked = check_data(_parsed(data) if isinstance(data, str) else data)
    except ValueError as error:
        unread = isinstance(data, str) and "=" in data and "not a number" in str(error)
        hint = "; there is no file of this name, so the part after = is the weight" if unread else ""
        raise UserError(f"calibration data {data!r}: {error}{hint}") from None
    if isinstance(checked, dict):
        return Mixture(tuple(checked), tuple(checked.values()))
    return Mixture((checked,) if isinstance(checked, str) else checked, None)


class Misplaced(ValueError):
    """Errors inside a value, by key or position."""

    def __init__(self, places: Mapping[str | int, str]) -> None:
        super().__init__("; ".join(f"{place}: {message}" for place, message in places.items()))
        self.places = places


def check_data(value: object) -> Data:
    """Return a value as calibration texts; of weights only the ratios count.

    Raises Misplaced for an empty or repeated name and for a weight that is not above 0, and ValueError for a value that
    names no text.
    """
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, Mapping | list | tuple) and value:
        wrong: dict[str | int, str] = {}
        for place, name in enumerate(value):
            if not isinstance(name, str) or not name.strip():
                wrong[str(name) if isinstance(value, Mapping) else place] = f"{name!r} is not a name"
            elif isinstance(value, Mapping):
                wrong[name] = _wrong_weight(value[name])
            elif name in value[:place]:
                wrong[place] = f"{name!r} is written twice"
        if wrong := {place: message for place, message in wrong.items() if message}:
            raise Misplaced(wrong)
        return dict(value) if isinstance(value, Mapping) else tuple(value)
    raise ValueError(
        f"{value!r} names no text; write such as wikitext2, [wikitext2, c4] or {{wikitext2: 2, c4: 1}}"
    )


def _wrong_weight(weight: object) -> str:
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        return as_text_number(weight) or f"{weight!r} is not a number; a weight is above 0, such as 2"
    if not (weight > 0 and math.isfinite(weight)):
        return f"a weight of {weight} draws no blocks; write a number above 0, or leave the text out"
    return ""


def shares(samples: int, weights: Sequence[Fraction]) -> list[int]:
    """Split samples in proportion to weights by largest remainder (ties: the earlier source), at least one each.

    Sources without a sample get one; the others share the rest. ``samples`` must be at least the number of weights.
    """
    quotas = [samples * weight / sum(weights) for weight in weights]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    if all(counts):
        return counts
    rich = [weight for weight, count in zip(weights, counts, strict=True) if count]
    rest = iter(shares(samples - counts.count(0), rich))
    return [next(rest) if count else 1 for count in counts]


def interleaved(parts: Sequence[Tensor]) -> Tensor:
    """Join the blocks (n, tokens) of several sources, each spread evenly and in its own order."""
    order = [
        (Fraction(2 * j + 1, 2 * len(part)), i) for i, part in enumerate(parts) for j in range(len(part))
    ]
    stacked = torch.cat(list(parts))
    return stacked[torch.tensor(sorted(range(len(order)), key=lambda at: order[at]))]


@contextmanager
def about(what: str) -> Iterator[None]:
    """Prefix a UserError's message with its subject."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def _most(weights: Sequence[Fraction], room: Sequence[int | None], limit: int) -> int:
    """Return the most samples up to ``limit`` whose shares fit in ``room``, at least one for each source."""
    total, count = sum(weights), len(weights)
    # A share is below its exact quota by at most one for rounding and one for each source that was given a sample.
    bounds = [(blocks + count + 1) * total // w for w, blocks in zip(weights, room, strict=True) if blocks]
    for samples in range(min([limit, *bounds]), count, -1):
        counts = shares(samples, weights)
        if all(blocks is None or share <= blocks for share, blocks in zip(counts, room, strict=True)):
            return samples
    return count


def _parsed(data: str) -> object:
    """Parse a string into the value that a plan would have."""
    file = data.rpartition(":")[0]
    if _is_file(data) or ("," in file and _is_file(file)):
        return data
    pairs: list[tuple[str, str | None]] = []
    for part in (part.strip() for part in data.split(",")):
        name, equals, weight = part.rpartition("=")
        weighted = equals and not _is_file(part)
        pairs.append((name.strip(), weight.strip()) if weighted else (part, None))
    names = [name for name, _ in pairs]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ValueError(f"{name!r} is written twice")
    unweighted = [name for name, weight in pairs if weight is None]
    if not unweighted:
        return {name: _number(weight or "") for name, weight in pairs}
    if unweighted != names:
        raise ValueError(
            f"{unweighted[0]!r} has no weight, but others have one; give all a weight or none. For a file name with a "
            "comma, name only this file, or write {NAME: 2, ...} in a plan"
        )
    return names if names[1:] else names[0]


def _number(word: str) -> float | str:
    try:
        number = float(word)
    except ValueError:
        return word
    return int(number) if number.is_integer() else number


def _is_file(name: str) -> bool:
    return Path(name).expanduser().is_file()


def _label(labels: Sequence[str], weights: Sequence[float] | None) -> str:
    if weights is None:
        return ",".join(labels)
    return ",".join(f"{label}={weight}" for label, weight in zip(labels, weights, strict=True))
