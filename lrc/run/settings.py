"""Choose device, precision and batch size from the user's options, or by default."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lrc.errors import UserError, nearest
from lrc.run.processes import ALONE, Processes

Progress = Callable[[str, int], Callable[[int], object]]
Warn = Callable[[str], object]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BATCH_TOKENS = {"cuda": 2**14, "cpu": 2**12}
_WRITTEN_TOKENS = 2**15


def unseen(label: str, total: int) -> Callable[[int], object]:
    """Start a stage whose progress nobody sees."""
    return lambda done: None


@dataclass(frozen=True)
class Run:
    """Say where and how a verb runs.

    ``device``: cpu, cuda or cuda:N (default: the first GPU). ``dtype``: of the layers (default: the checkpoint's on a
    GPU, float32 on a CPU). ``batch_size``: blocks, or requests of tasks, at once (default: blocks by
    their length). ``offload``: place of hidden
    states between two layers, one of ``lrc.run.offload.PLACES`` (default: the first with room). ``data_dir``: folder
    with the data sets, instead of the hub. ``revision``: branch, tag or commit of the model on the hub.
    ``allow_pickle``: read pickled weights. ``trust_remote_code``: run code that comes with the checkpoint. ``progress``
    gets a stage's name and length and returns a function to call with steps done; a resumed run first calls it with the
    steps of earlier processes. ``warn`` gets each warning once, as soon as it is known. ``processes`` share the work;
    each of them calls the verb with the same arguments.
    """

    device: str | None = None
    dtype: str | None = None
    batch_size: int | None = None
    offload: str | None = None
    data_dir: str | Path | None = None
    revision: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    progress: Progress | None = None
    warn: Warn | None = None
    processes: Processes = ALONE

    @property
    def data_folder(self) -> Path | None:
        return None if self.data_dir is None else Path(self.data_dir)

    def stage(self, label: str, total: int) -> Callable[[int], object]:
        """Start a stage of ``total`` steps; return the function to call with steps done."""
        return (self.progress or unseen)(label, total)


def find_device(name: str | None, processes: Processes = ALONE) -> torch.device:
    """Return the device ``name``, made the current one; by default the first GPU, or one GPU for each process.

    Raises UserError if there is no such device.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there = ["cpu", *gpus, *(["cuda"] if gpus else [])]
    if name is not None and name not in there:
        raise UserError(f"there is no device {name!r} on this machine; {nearest(name, there)}")
    if name is None or name == "cuda":
        if gpus and processes.local >= len(gpus):
            lacking = f"process {processes.local} of this machine has no GPU: there are {len(gpus)}"
            raise UserError(f"{lacking}; start one process for each GPU, or say --device cpu")
        name = gpus[processes.local] if gpus else "cpu"
    elif name in gpus and not processes.alone:
        raise UserError(f"--device {name} is one GPU for {processes.size} processes; use --device cuda")
    device = torch.device(name)
    if device.type == "cuda":
        # Compiled kernels run on the current device, wherever their tensors are.
        torch.cuda.set_device(device)
        # torch needs it for deterministic matrix products, and reads it at the first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return device


def find_dtype(name: str | None, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Return the dtype of layers: ``name``, else the checkpoint's (``stored``) on a GPU and float32 on a CPU."""
    if name is None:
        return torch.float32 if device.type == "cpu" or stored not in DTYPES.values() else stored
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}; {nearest(name, DTYPES)}")
    return DTYPES[name]


def default_batch(device: str, seq_len: int) -> int:
    """Return the default number of blocks that run at once on a ``cuda`` or ``cpu`` device."""
    return max(_BATCH_TOKENS[device] // seq_len, 1)


def generating_batch(seq_len: int) -> int:
    """Return the default number of blocks that a model generates at once; a step for many costs little more."""
    return max(_WRITTEN_TOKENS // seq_len, 1)
