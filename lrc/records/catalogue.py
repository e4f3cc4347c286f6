"""One thing that a user can choose."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One choice; ``source``: its paper, or where it is on the hub."""

    name: str
    summary: str
    source: str = ""
