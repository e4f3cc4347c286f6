"""Offload hidden states between two layers: keep them on the device, in host memory or on disk.

Copies between a GPU and the host run on their own CUDA stream, in order and in parallel with the work.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from lrc.errors import OutOfResources

Place = Literal["device", "host", "disk"]
PLACES: tuple[Place, ...] = get_args(Place)


@dataclass(frozen=True)
class States:
    """Hold the place for hidden states, and the ``folder`` for those on disk. The place changes no bit of a result."""

    place: Place = "device"
    folder: Path | None = None

    def keep(self, x: Tensor) -> Tensor:
        """Return a copy of x at the place, or x itself if it is there.

        Copies to the host are asynchronous: ``send``, which brings them back, uses the same stream. Raises
        OutOfResources if the disk is full.
        """
        if self.place == "disk":
            return self._on_disk(x)
        if self.place == "host" and x.is_cuda:
            return _off(x)
        return x

    def _on_disk(self, x: Tensor) -> Tensor:
        """Copy x to an unlinked file, which vanishes with the tensor or the process."""
        assert self.folder is not None, "states on disk have a folder"
        descriptor, path = tempfile.mkstemp(prefix="states-", dir=self.folder)
        try:
            # Without allocated pages, a write to the full disk would kill the process.
            os.posix_fallocate(descriptor, 0, max(x.nbytes, 1))
            held = torch.from_file(path, shared=True, size=x.numel(), dtype=x.dtype)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OutOfResources(
                f"the disk is full: {self.folder} needs {x.nbytes:,} bytes more for hidden states. Free some space and "
                "run the same command again"
            ) from error
        finally:
            os.close(descriptor)
            os.unlink(path)
        return held.view(x.shape).copy_(x)


ON_DEVICE = States()


def send(states: Sequence[Tensor], device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Start copying states to a device; return a function that gives the copies, for work queued after its call."""
    if all(x.device == device for x in states):
        return lambda: tuple(states)
    if device.type != "cuda":
        return lambda: tuple(x.to(device) for x in states)
    queue = _copies(device)
    with torch.cuda.stream(queue):
        there = [x.to(device, non_blocking=True) for x in states]
        done = queue.record_event()

    def arrived() -> tuple[Tensor, ...]:
        current = torch.cuda.current_stream(device)
        current.wait_event(done)
        for x in there:
            x.record_stream(current)  # keeps its memory while the work reads it
        return tuple(there)

    return arrived


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies in host memory, complete on return; from a GPU to pinned memory, for speed."""
    found = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    held = {name: _off(tensor) if tensor.is_cuda else tensor for name, tensor in found.items()}
    for device in {tensor.device for tensor in found.values() if tensor.is_cuda}:
        _copies(device).synchronize()
    return held


def _off(x: Tensor) -> Tensor:
    """Copy a GPU tensor to pinned memory; the copy is complete once the stream of copies reaches it."""
    queue = _copies(x.device)
    queue.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(queue):
        held = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
    x.record_stream(queue)
    return held


def _copies(device: torch.device) -> torch.cuda.Stream:
    return _queue(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _queue(gpu: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(gpu)
