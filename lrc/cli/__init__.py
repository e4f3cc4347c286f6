"""The command line: one file a verb, which parses, calls the library and prints."""

from __future__ import annotations

from typing import Any

from lrc.cli.interrupt import end_at_once, unwind


def main() -> None:
    """Run the command line. The exit code is 0, 2 for a user's mistake, 130 if interrupted, 1 for a failure of lrc."""
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
