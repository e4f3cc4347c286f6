"""Mistakes of the user: one message that names the thing, the place and the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend; the command line prints it without a traceback and exits with 2."""


class Resumable(UserError):
    """Something stopped a run that can go on once it is mended; what was finished stays."""


class OutOfResources(Resumable):
    """Something ran out: disk, GPU memory."""


class Lost(OutOfResources):
    """Another process of the run ended, or no longer answers."""


class Paused(KeyboardInterrupt):
    """Someone interrupted what the same command takes up again."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """End a message about an unknown word: the nearest choice if one is near, and the choices."""
    known = sorted(choices)
    cutoff = 0.6 if len(word) > 2 else 0.5  # of two letters one may be wrong
    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known) or 'none'}"


def as_text_number(value: object) -> str:
    """How a number that YAML takes for text has to be written; empty where the value is not one."""
    try:
        number = repr(float(value)) if isinstance(value, str) else "nan"
    except ValueError:
        return ""
    if number in ("nan", "inf", "-inf"):
        return ""
    if "e" in number and "." not in number:  # YAML wants 1.0e-07 where Python writes 1e-07
        number = number.replace("e", ".0e")
    return f"{value!r} is text to YAML, not a number; write {number.removesuffix('.0')}"
