"""``python -m lrc`` is the command line."""

from __future__ import annotations

from lrc.cli import main

main()
