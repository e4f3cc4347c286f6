"""Seconds by stage of a run, with the device's queue drained at the ends of every stage."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up time by stage name; stages may come back, and must not overlap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time until the context closes as ``name``."""
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def peak_bytes(self) -> dict[str, int]:
        """Largest memory held so far: of the process, and of the device's allocator where it is a GPU."""
        peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        if self._device.type == "cuda":
            peak["device"] = torch.cuda.max_memory_allocated(self._device)
        return peak

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
