"""Whether a device, the host and the disk have the room that a run needs, as it is when it starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import psutil
import torch

from lrc.checkpoint.headers import StoredTensor
from lrc.errors import OutOfResources, UserError, nearest
from lrc.estimate.memory import HELD_OUT_SAMPLES, estimate_memory, measuring_memory
from lrc.plan.job import Job
from lrc.run.offload import PLACES, Place

_HOST = torch.device("cpu")
_SHARE = 0.8  # of what is free: workspaces and fragments are in no estimate
_EVALUATED = 2**14  # tokens at once when perplexity is measured


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def known_place(asked: str | None) -> Place | None:
    """The place for hidden states that a user names, if one is named; UserError where it is not known."""
    for place in PLACES:
        if asked == place:
            return place
    if asked is not None:
        raise UserError(
            f"--offload {asked}: no place for hidden states is called {asked!r}; {nearest(asked, PLACES)}"
        )
    return None


def choose_place(
    asked: Place | None, job: Job, device: torch.device, dtype: torch.dtype, batch_size: int, samples: int
) -> Place:
    """Where hidden states wait: where it is ``asked``, else on the first of device, host and disk that has the room."""
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
    """Return whether the whole model fits on a device with what measuring its sizes takes (``measuring_memory``)."""
    needed = measuring_memory(job, dtype, batch_size, samples, HELD_OUT_SAMPLES, place)
    return needed <= _SHARE * free_bytes(device)


def place_for(held: int, device: torch.device) -> Place:
    """The first place with room for hidden states of ``held`` bytes beside all else."""
    if held <= _SHARE / 2 * free_bytes(device):
        return "device"
    return "host" if device.type != _HOST.type and held <= _SHARE * free_bytes(_HOST) else "disk"


def fits_whole(
    tensors: Iterable[StoredTensor], vocab: int, dtype: torch.dtype | None, device: torch.device
) -> bool:
    """Whether a model of these tensors, run in ``dtype`` (None: as stored), fits on a device with a batch's logits.

    Where all else is small beside the weights, twice the logits allow for it.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    each = [(t.bytes // t.dtype.itemsize, (dtype or t.dtype).itemsize) for t in tensors]
    weights = sum(count * size for count, size in each)
    logits = _EVALUATED * vocab * max(size for _, size in each)
    return weights + 2 * logits <= _SHARE * free_bytes(device)


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Tell a GPU that is out of memory as OutOfResources, with what to try."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise OutOfResources(f"the GPU is out of memory; try {advice} ({reason})") from error
