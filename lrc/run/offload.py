"""Where hidden states wait between two layers: on the device, in the host's memory or on disk.

Between a GPU and the host they go through a queue of their own, in order there and beside the work.
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
    """A place for hidden states; ``folder`` is where files of those on disk are made, which never have a name for long.

    The values are the same wherever they wait, so that the place decides no bit of a result.
    """

    place: Place = "device"
    folder: Path | None = None

    def keep(self, x: Tensor) -> Tensor:
        """The values of x where states wait; where that is where x is, x itself.

        Copies off a GPU to the host are not waited for: ``send``, which takes them back, is behind them in the same
        queue. Raises OutOfResources where the disk has no room.
        """
        if self.place == "disk":
            return self._on_disk(x)
        if self.place == "host" and x.is_cuda:
            return _off(x)
        return x

    def _on_disk(self, x: Tensor) -> Tensor:
        """A copy in a file without a name: the file goes when the tensor does, or the process however it ends."""
        assert self.folder is not None, "states on disk have a folder"
        descriptor, path = tempfile.mkstemp(prefix="states-", dir=self.folder)
        try:
            # A page that finds no room when it is written would end the process.
            os.posix_fallocate(descriptor, 0, max(x.nbytes, 1))
            held = torch.from_file(path, shared=True, size=x.numel(), dtype=x.dtype)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OutOfResources(
                f"the disk is full: {self.folder}; hidden states wait there, {x.nbytes:,} bytes more are needed. Free "
                "some space and run the same command again"
            ) from error
        finally:
            os.close(descriptor)
            os.unlink(path)
        return held.view(x.shape).copy_(x)


ON_DEVICE = States()


def send(states: Sequence[Tensor], device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Start states that wait anywhere on their way to a device; the result, called, gives them there, for what is
    queued from then on.
    """
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
            x.record_stream(current)  # or its memory could be used again while the work still reads it
        return tuple(there)

    return arrived


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the host's memory, contiguous and there when this returns: from a GPU they go to pinned memory, at
    several times the speed of any other.
    """
    found = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    held = {name: _off(tensor) if tensor.is_cuda else tensor for name, tensor in found.items()}
    for device in {tensor.device for tensor in found.values() if tensor.is_cuda}:
        _copies(device).synchronize()
    return held


def _off(x: Tensor) -> Tensor:
    """A copy of what is on a GPU in pinned memory, which is there when the queue of copies has got so far."""
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
