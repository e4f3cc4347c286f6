"""Check the options of an entry against the keyword-only parameters of its solver."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lrc.errors import as_text_number, nearest
from lrc.methods.contract import Solver


def read_options(own: Mapping[str, Any], solver: Solver) -> tuple[dict[str, Any], dict[str, str]]:
    """Return every option of a solver with the entry's value or the default, and the mistakes by key."""
    known, wrong = solver.options, {}
    values = {name: option.default for name, option in known.items()}
    for key, value in own.items():
        if key == solver.size.word:
            continue
        if key not in known:
            wrong[key] = f"unknown key; {nearest(key, {'keep', 'method', solver.size.word, *known})}"
            continue
        try:
            values[key] = _adapter(known[key].annotation).validate_python(value, strict=True)
        except ValidationError as error:
            wrong[key] = _message(value, known[key].annotation, error)
    return values, wrong


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


def _message(value: Any, annotation: Any, error: ValidationError) -> str:
    if get_origin(annotation) is Literal:
        return f"{value!r} is not known; {nearest(str(value), map(str, get_args(annotation)))}"
    if number := as_text_number(value):
        return number
    reason = error.errors(include_url=False)[0]["msg"].removeprefix("Input ")
    return f"{value!r} is not legal: it {reason}"
