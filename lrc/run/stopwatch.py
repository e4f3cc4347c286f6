"""Time the stages of a run; the device is synchronized at both ends of a stage."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Hold the total seconds and peak device memory of each stage; stages may repeat, but not overlap.

    ``save`` is called at the end of each stage.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._running: tuple[str, float] | None = None
        self._earlier: dict[str, int] = {}  # peak memory of earlier processes of the run
        self.seconds: dict[str, float] = {}
        self.device_bytes: dict[str, int] = {}
        self.save: Callable[[], object] = lambda: None
        if self._cuda:
            torch.cuda.init()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside the context to stage ``name``."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        start = self._now()
        self._running = name, start
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start
            self._running = None
            if self._cuda:
                peak = torch.cuda.max_memory_allocated(self._cuda)
                self.device_bytes[name] = max(self.device_bytes.get(name, 0), peak)
            self.save()

    @property
    def peak_bytes(self) -> dict[str, int]:
        """Return the peak memory so far of the process (``host``) and of a GPU's allocator (``device``)."""
        peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        peak |= {"device": max(self.device_bytes.values(), default=0)} if self._cuda else {}
        return _largest(peak, self._earlier)

    def times(self) -> dict[str, Any]:
        """Return seconds and peaks so far as JSON values, with the seconds of a stage that has not ended."""
        seconds = dict(self.seconds)
        if self._running:
            name, start = self._running
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return {"seconds": seconds, "device_bytes": self.device_bytes, "peak_bytes": self.peak_bytes}

    def resume(self, times: Mapping[str, Any]) -> None:
        """Add the ``times`` of the earlier processes of a run."""
        earlier, own = times.get("seconds", {}), self.seconds
        self.seconds = {name: earlier.get(name, 0.0) + own.get(name, 0.0) for name in {**earlier, **own}}
        self.device_bytes = _largest(times.get("device_bytes", {}), self.device_bytes)
        self._earlier = dict(times.get("peak_bytes", {}))

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize(self._cuda)
        return time.perf_counter()


def _largest(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: max(one.get(name, 0), other.get(name, 0)) for name in {**one, **other}}
