"""The command line: one file for each verb, which parses options, calls the library and prints."""

from __future__ import annotations

from typing import Any

from lrc.cli.interrupt import end_at_once, unwind


def main() -> None:
    """Run the command line. Exit codes: 0 success, 2 wrong input, 130 interrupted, 1 a failure of lrc."""
    end_at_once()
    try:
        from lrc.cli.command import app

        app(prog_name="lrc")
    finally:
        unwind()


def __getattr__(name: str) -> Any:
    if name == "app":
        from lrc.cli.command import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
