"""Read this process's rank from the environment that torchrun and similar launchers set."""

from __future__ import annotations

import os
from typing import NamedTuple


class ProcessRank(NamedTuple):
    """Hold this process's rank, the number of processes, and its rank on its own machine."""

    rank: int = 0
    size: int = 1
    local: int = 0


def own_rank() -> ProcessRank:
    """Return this process's rank; a single process without a launcher."""
    words = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    return ProcessRank(*map(int, words)) if all(word.isdecimal() for word in words) else ProcessRank()
