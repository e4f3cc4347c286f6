"""Parse the texts of a mixture, and split samples between them in proportion to their weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lrc.errors import UserError, as_text_number
from lrc.text.datasets import GENERAL, GENERAL_WEIGHTS, HELD_OUT, SYNTHETIC
from lrc.text.source import Use, check_text

Data = str | tuple[str, ...] | dict[str, float]
DataLike = str | Sequence[str] | Mapping[str, float]  # accepted from callers as Data


@dataclass(frozen=True)
class Mixture:
    """Hold sources by name, as ``read_text`` takes them or ``synthetic``, and their ``weights``, if any.

    ``general``: the default mixture, of which sources that cannot be had are left out.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] | None
    general: bool = False

    def check(self, samples: int | Literal["all"], use: Use = "calibration") -> None:
        """Raise UserError for an unknown source, and for ``samples`` that no texts of these sources could give."""
        if self.general:
            return
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
            if name != SYNTHETIC or use != "calibration":
                check_text(name, use)

    @property
    def fractions(self) -> list[Fraction]:
        """Return the weights, equal if there are none."""
        return [Fraction(str(weight)) for weight in self.weights or [1] * len(self.names)]

    @property
    def data(self) -> Data:
        """Return the names as a plan writes them."""
        if self.general:
            return GENERAL
        return self.names if self.weights is None else dict(zip(self.names, self.weights, strict=True))

    def of(self, names: Collection[str]) -> Mixture:
        """Return the mixture of these sources alone."""
        kept = [i for i, name in enumerate(self.names) if name in names]
        weights = None if self.weights is None else tuple(self.weights[i] for i in kept)
        return replace(self, names=tuple(self.names[i] for i in kept), weights=weights)


def general_mixture(use: Use = "calibration", names: Collection[str] = GENERAL_WEIGHTS) -> Mixture:
    """Return the default mixture of those of its sources that are named; for held-out text with their stand-ins."""
    weights = dict[str, float]()
    for name in (name for name in GENERAL_WEIGHTS if name in names):
        here = HELD_OUT.get(name, name) if use == "held-out" else name
        weights[here] = weights.get(here, 0) + GENERAL_WEIGHTS[name]
    return Mixture(tuple(weights), tuple(weights.values()), general=True)


def read_mixture(data: DataLike, use: Use = "calibration") -> Mixture:
    """Parse texts: a string as on the command line, a list of names, or a mapping from names to weights.

    In a string, commas separate sources, and the last ``=`` of a source precedes its weight. A string, or a part, that
    is the name of a file is that file. Raises UserError for a source named twice, weights on only some sources, and a
    weight that is not a number above 0.
    """
    try:
        checked = check_data(_parsed(data) if isinstance(data, str) else data)
    except ValueError as error:
        unread = isinstance(data, str) and "=" in data and "not a number" in str(error)
        hint = "; there is no file of this name, so the part after = is the weight" if unread else ""
        raise UserError(f"{use} data {data!r}: {error}{hint}") from None
    if checked == GENERAL:
        return general_mixture(use)
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

    Raises Misplaced for an empty or repeated name, for ``general`` among other names and for a weight that is not above
    0, and ValueError for a value that names no text.
    """
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, Mapping | list | tuple) and value:
        wrong: dict[str | int, str] = {}
        for place, name in enumerate(value):
            if not isinstance(name, str) or not name.strip():
                wrong[str(name) if isinstance(value, Mapping) else place] = f"{name!r} is not a name"
            elif name == GENERAL:
                texts = ",".join(f"{text}={weight}" for text, weight in GENERAL_WEIGHTS.items())
                wrong[name if isinstance(value, Mapping) else place] = (
                    f"{GENERAL} is a mixture, not a part of one; name it alone, or its texts: {texts}"
                )
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


def filled(samples: int, weights: Sequence[Fraction], room: Sequence[int]) -> list[int]:
    """Split samples as ``shares`` does; a source with fewer blocks than its share gives all, and others fill up.

    ``samples`` must be at least the number of weights and at most the sum of ``room``.
    """
    full = dict[int, int]()
    while True:
        others = [i for i in range(len(weights)) if i not in full]
        counts = shares(samples - sum(full.values()), [weights[i] for i in others])
        short = [i for i, count in zip(others, counts, strict=True) if count > room[i]]
        if not short:
            found = full | dict(zip(others, counts, strict=True))
            return [found[i] for i in range(len(weights))]
        full |= {i: room[i] for i in short}


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


def most(weights: Sequence[Fraction], room: Sequence[int | None], limit: int) -> int:
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


def label_of(labels: Sequence[str], weights: Sequence[float] | None) -> str:
    """Return texts and their weights as the command line writes them."""
    if weights is None:
        return ",".join(labels)
    return ",".join(f"{label}={weight}" for label, weight in zip(labels, weights, strict=True))
