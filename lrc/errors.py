"""Errors that users see: one message with the thing, the place and the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix; the command line prints it without a traceback and exits with 2."""


class Resumable(UserError):
    """An error that stopped a run; the run resumes from its finished parts once the error is fixed."""


class OutOfResources(Resumable):
    """A run ended because the disk or GPU memory is full."""


class ProcessEnded(OutOfResources):
    """Another process of the run ended or no longer answers; ``reported`` if yet another process reports that."""

    reported = False


class Paused(KeyboardInterrupt):
    """An interrupt of work that the same command resumes."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return the end of a message about an unknown word: the nearest choice, if any, and all choices."""
    known = sorted(choices)
    cutoff = 0.6 if len(word) > 2 else 0.5  # in two letters, one may be wrong
    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known) or 'none'}"


def as_text_number(value: object) -> str:
    """Return a hint if ``value`` is a number that YAML reads as text, such as 1e-7; else an empty string."""
    try:
        number = repr(float(value)) if isinstance(value, str) else "nan"
    except ValueError:
        return ""
    if number in ("nan", "inf", "-inf"):
        return ""
    if "e" in number and "." not in number:  # YAML needs 1.0e-07 where Python writes 1e-07
        number = number.replace("e", ".0e")
    return f"{value!r} is text to YAML, not a number; write {number.removesuffix('.0')}"
