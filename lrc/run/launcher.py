"""What torchrun and its like say in the environment: this process's place among those that they started."""

from __future__ import annotations

import os
from typing import NamedTuple


class Place(NamedTuple):
    """The ``rank`` of this process among ``size``, and its number on its own machine, ``local``."""

    rank: int = 0
    size: int = 1
    local: int = 0


def place() -> Place:
    """This process's place; the only one where no launcher says otherwise."""
    words = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    return Place(*map(int, words)) if all(word.isdecimal() for word in words) else Place()
