"""The processes that a launcher started for a verb: one of them prints, and all end alike."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from lrc.errors import ProcessEnded
from lrc.run.launcher import place

if TYPE_CHECKING:
    from lrc.run.processes import Processes

MISTAKE, INTERRUPTED = 2, 130


def speaks(error: Exception | None = None) -> bool:
    """Return whether this process prints: the first does, and any that finds another lost."""
    return place().rank == 0 or isinstance(error, ProcessEnded)


@contextmanager
def processes() -> Iterator[Processes]:
    """Give all processes of the run, until the context closes.

    A UserError in one of them is raised in all, and ``ProcessEnded`` in the first to miss another; the others then exit
    silently. A launcher that misses one stops the others by SIGTERM.
    """
    from lrc.run.processes import AGAIN, ALONE, launched

    def stop(*_: object) -> None:
        raise ProcessEnded(
            f"the launcher stopped this run (SIGTERM), as it does when one of its processes ends; {AGAIN}"
        )

    joined = ALONE
    try:
        with launched() as joined:
            if not joined.alone:
                signal.signal(signal.SIGTERM, stop)
            yield joined
    except BaseException as error:
        if not joined.alone:  # this process ends now, and should print its message and set its exit code
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if isinstance(error, ProcessEnded) and not joined.first_to_miss():
            raise typer.Exit(MISTAKE) from None
        raise
