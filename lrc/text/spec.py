"""Check the calibration texts of a plan: one name, a list of names, or a mapping from names to weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lrc.errors import as_text_number

Data = str | tuple[str, ...] | dict[str, float]
DataLike = str | Sequence[str] | Mapping[str, float]  # accepted from callers as Data


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
    if isinstance(value, Mapping) and value:
        found: dict[str | int, str] = {str(name): _wrong(name, weight) for name, weight in value.items()}
        if any(found.values()):
            raise Misplaced({name: message for name, message in found.items() if message})
        return dict(value)
    if isinstance(value, list | tuple) and value:
        wrong: dict[str | int, str] = {}
        for place, name in enumerate(value):
            if not _is_name(name):
                wrong[place] = f"{name!r} is not a name"
            elif name in value[:place]:
                wrong[place] = f"{name!r} is written twice"
        if wrong:
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
        return f"a weight of {weight} draws no blocks; write a number above 0, or leave the text out"
    return ""
