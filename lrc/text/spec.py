"""How calibration texts are written in a plan: one, a list of them, or texts with weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lrc.errors import as_text_number

Data = str | tuple[str, ...] | dict[str, float]
DataLike = str | Sequence[str] | Mapping[str, float]  # what a caller may give for it


class Misplaced(ValueError):
    """Mistakes inside a value, by the key or position that each is at."""

    def __init__(self, places: Mapping[str | int, str]) -> None:
        super().__init__("; ".join(f"{place}: {message}" for place, message in places.items()))
        self.places = places


def check_data(value: object) -> Data:
    """A value as calibration texts; weights are proportions, so only their ratios count.

    Raises Misplaced for a text without a name or written twice and for a weight that is not above 0, and ValueError
    for what names no text at all.
    """
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, Mapping) and value:
        wrong: dict[str | int, str] = {
            str(name): message for name, weight in value.items() if (message := _wrong(name, weight))
        }
        if wrong:
            raise Misplaced(wrong)
        return dict(value)
    if isinstance(value, list | tuple) and value:
        unnamed: dict[str | int, str] = {
            place: f"{name!r} is not a name" for place, name in enumerate(value) if not _is_name(name)
        }
        twice = {
            place: f"{name!r} is written twice"
            for place, name in enumerate(value)
            if place not in unnamed and name in value[:place]
        }
        if wrong := unnamed | twice:
            raise Misplaced(wrong)
        return tuple(value)
    raise ValueError(
        f"{value!r} names no text; write such as wikitext2, [wikitext2, c4] or {{wikitext2: 2, c4: 1}}"
    )


def _is_name(name: object) -> bool:
    return isinstance(name, str) and bool(name.strip())


def _wrong(name: object, weight: object) -> str:
    if not _is_name(name):
        return f"{name!r} is not a name"
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        return as_text_number(weight) or f"{weight!r} is not a number; a weight is above 0, such as 2"
    if not (weight > 0 and math.isfinite(weight)):
        return f"a weight of {weight} draws nothing that can be counted; write one above 0, or leave the text out"
    return ""
