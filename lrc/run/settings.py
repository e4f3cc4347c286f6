"""Device, precision and batch size of a run: what the user says, or the default."""

from __future__ import annotations

import os

import torch

from lrc.errors import UserError, nearest
from lrc.run.processes import ALONE, Ranks

_BATCH_TOKENS = {"cuda": 2**14, "cpu": 2**12}
_WRITTEN_TOKENS = 2**15
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name: str | None, ranks: Ranks = ALONE) -> torch.device:
    """The device a user names, made the current one; by default the first GPU if there is one.

    Of several processes on a machine each has the GPU of its number. Raises UserError where it is not there.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there = ["cpu", *gpus, *(["cuda"] if gpus else [])]
    if name is not None and name not in there:
        raise UserError(f"there is no device {name!r} on this machine; {nearest(name, there)}")
    if name is None or name == "cuda":
        if gpus and ranks.local >= len(gpus):
            raise UserError(
                f"process {ranks.local} of this machine has no GPU of its own: there are {len(gpus)}; start as many "
                "processes as there are GPUs, or say --device cpu"
            )
        name = gpus[ranks.local] if gpus else "cpu"
    elif name in gpus and not ranks.alone:
        raise UserError(
            f"--device {name} is one GPU for {ranks.size} processes; say cuda, and each has its own"
        )
    device = torch.device(name)
    if device.type == "cuda":
        # Kernels that are compiled on the way run on the current device, whatever they are given.
        torch.cuda.set_device(device)
        # Without it torch refuses products where sums must have a fixed order; it is read at the first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return device


def find_dtype(name: str | None, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The precision layers run in: what a user names, else the checkpoint's own on a GPU and float32 on a CPU."""
    if name is None:
        return torch.float32 if device.type == "cpu" or stored not in DTYPES.values() else stored
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}; {nearest(name, DTYPES)}")
    return DTYPES[name]


def default_batch(device: str, seq_len: int) -> int:
    """Blocks that run at once on a ``cuda`` or ``cpu`` device unless the user says how many."""
    return max(_BATCH_TOKENS[device] // seq_len, 1)


def generating_batch(seq_len: int) -> int:
    """Blocks that a model writes at once unless the user says how many; a step costs little more for many than one."""
    return max(_WRITTEN_TOKENS // seq_len, 1)
