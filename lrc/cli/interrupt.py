"""End at once on Ctrl-C while a command imports its modules; afterwards Ctrl-C raises KeyboardInterrupt."""

from __future__ import annotations

import os
import signal

from lrc.run.launcher import own_rank

INTERRUPTED = 130  # exit code


def end_at_once() -> None:
    """End on Ctrl-C with one line, unless the caller ignores or handles it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def unwind() -> None:
    """Raise KeyboardInterrupt on Ctrl-C again, so that work in progress is cleaned up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    if own_rank().rank == 0:
        os.write(2, b"error: interrupted before the work began; run the same command again\n")
    os._exit(INTERRUPTED)
