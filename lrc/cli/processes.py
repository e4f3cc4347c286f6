"""The processes that a launcher started for a verb: one of them prints, and all end alike."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from lrc.errors import Lost
from lrc.run.launcher import place

if TYPE_CHECKING:
    from lrc.run.processes import Ranks

MISTAKE, INTERRUPTED = 2, 130


def speaks(error: Exception | None = None) -> bool:
    """Return whether this process prints: the first does, and any that finds another lost."""
    return place().rank == 0 or isinstance(error, Lost)


@contextmanager
def processes() -> Iterator[Ranks]:
    """Give all processes of the run, until the context closes.

    A UserError in one of them is raised in all, and ``Lost`` in the first to miss another; the others then leave
    silently. A launcher that misses one stops the others by SIGTERM.
    """
    from lrc.run.processes import AGAIN, ALONE, launched

    def stop(*_: object) -> None:
        raise Lost(
            f"the launcher stopped this run (SIGTERM), as it does when one of its processes ends; {AGAIN}"
        )

    ranks = ALONE
    try:
        with launched() as ranks:
            if not ranks.alone:
                signal.signal(signal.SIGTERM, stop)
            yield ranks
    except BaseException as error:
        if not ranks.alone:  # this process ends now, and should print its message and set its exit code
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if isinstance(error, Lost) and not ranks.first_to_miss():
            raise typer.Exit(MISTAKE) from None
        raise
