"""The processes that a verb runs in, where a launcher started several: one of them speaks, and all end alike."""

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
    """Whether this process tells of what all of them raise: the first does, unless that may be the lost one."""
    return place().rank == 0 or isinstance(error, Lost)


@contextmanager
def processes(split: bool = True) -> Iterator[Ranks]:
    """All processes of the run, until the context closes; where it is not ``split``, this one alone.

    A UserError in one of them is raised in all, and ``Lost`` in the first to miss another; the rest then leave without
    a word. A launcher that misses one stops the others by SIGTERM.
    """
    from lrc.run.processes import AGAIN, ALONE, launched

    def stop(*_: object) -> None:
        raise Lost(
            f"the launcher stopped this run (SIGTERM), as it does when one of its processes ends; {AGAIN}"
        )

    ranks = ALONE
    if not split:
        yield ranks
        return
    try:
        with launched() as ranks:
            if not ranks.alone:
                signal.signal(signal.SIGTERM, stop)
            yield ranks
    except BaseException as error:
        if not ranks.alone:  # it ends by itself now, and should get its message out and its exit code
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if isinstance(error, Lost) and not ranks.first_to_miss():
            raise typer.Exit(MISTAKE) from None
        raise
