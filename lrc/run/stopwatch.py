"""Time the stages of a run; the device is synchronized at both ends of a stage."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Hold the total seconds and peak device memory of each stage; stages may repeat, but not overlap."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self.seconds: dict[str, float] = {}
        self.device_bytes: dict[str, int] = {}
        if self._cuda:
            torch.cuda.init()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside the context to stage ``name``."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start
            if self._cuda:
                peak = torch.cuda.max_memory_allocated(self._cuda)
                self.device_bytes[name] = max(self.device_bytes.get(name, 0), peak)

    @property
    def peak_bytes(self) -> dict[str, int]:
        """Return the peak memory so far of the process (``host``) and of a GPU's allocator (``device``)."""
        peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        return peak | ({"device": max(self.device_bytes.values(), default=0)} if self._cuda else {})

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize(self._cuda)
        return time.perf_counter()
