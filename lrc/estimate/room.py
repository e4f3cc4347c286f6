"""Check at the start of a run whether device, host and disk have enough room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import psutil
import torch

from lrc.checkpoint.headers import StoredTensor
from lrc.errors import OutOfResources, UserError, nearest
from lrc.estimate.memory import HELD_OUT_SAMPLES, estimate_memory, measuring_memory
from lrc.plan.job import Job
from lrc.run.offload import PLACES, Place

_HOST = torch.device("cpu")
_SHARE = 0.8  # of the free memory: no estimate covers workspaces and fragmentation
_EVALUATED = 2**14  # tokens at once when perplexity is measured


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def known_place(asked: str | None) -> Place | None:
    """Check the name of a place for hidden states; raise UserError if there is no such place."""
    if asked is not None and asked not in PLACES:
        raise UserError(f"--offload {asked}: no such place for hidden states; {nearest(asked, PLACES)}")
    return cast(Place | None, asked)


def choose_place(
    asked: Place | None, job: Job, device: torch.device, dtype: torch.dtype, batch_size: int, samples: int
) -> Place:
    """Return the place of hidden states: the one ``asked``, else the first of device, host and disk with room."""
    if asked is not None:
        return asked
    memory = estimate_memory(job, dtype, batch_size, samples=samples)
    if memory.peak <= _SHARE * free_bytes(device):
        return "device"
    if device.type == _HOST.type:  # the same memory
        return "disk"
    return "host" if memory.states + memory.gradients <= _SHARE * free_bytes(_HOST) else "disk"


def fits_measuring(
    job: Job, device: torch.device, dtype: torch.dtype, batch_size: int, samples: int, place: Place
) -> bool:
    """Tell whether ``measuring_memory`` fits on a device."""
    needed = measuring_memory(job, dtype, batch_size, samples, HELD_OUT_SAMPLES, place)
    return needed <= _SHARE * free_bytes(device)


def place_for(held: int, device: torch.device) -> Place:
    """Return the first place with room for ``held`` bytes of hidden states and everything else."""
    if held <= _SHARE / 2 * free_bytes(device):
        return "device"
    return "host" if device.type != _HOST.type and held <= _SHARE * free_bytes(_HOST) else "disk"


def fits_whole(
    tensors: Iterable[StoredTensor], vocab: int, dtype: torch.dtype | None, device: torch.device
) -> bool:
    """Tell whether a model of these tensors fits on a device in ``dtype`` (None: as stored) with a batch's logits.

    Twice the logits allow for everything else but the weights.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    each = [(t.bytes // t.dtype.itemsize, (dtype or t.dtype).itemsize) for t in tensors]
    weights = sum(count * size for count, size in each)
    logits = _EVALUATED * vocab * max(size for _, size in each)
    return weights + 2 * logits <= _SHARE * free_bytes(device)


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Raise OutOfResources with ``advice`` if the GPU runs out of memory."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise OutOfResources(f"the GPU is out of memory; try {advice} ({reason})") from error
