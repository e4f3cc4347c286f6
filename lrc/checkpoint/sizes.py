"""Compute a model's parameters, bytes and KV cache from shapes and module tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lrc.checkpoint.headers import StoredTensor
from lrc.families import Architecture


@dataclass(frozen=True)
class Size:
    """Hold a model's parameters, the bytes of its tensors on disk, and its KV cache in bytes per token."""

    parameters: int
    bytes: int
    kv_bytes_per_token: int


def size_of(
    tensors: Iterable[StoredTensor],
    architecture: Architecture,
    dtype: torch.dtype,
    table: Mapping[str, Mapping[str, Any]],
) -> Size:
    """Compute a checkpoint's size from its tensors' headers, with a cache in ``dtype``.

    ``table`` is the module table of a compressed checkpoint, empty for an original.
    """
    parameters = total = 0
    for stored in tensors:
        total += stored.bytes
        parameters += math.prod(stored.shape) if stored.dtype.is_floating_point else 0
    whole = 2 * architecture.head_dim
    reduced = [entry["qk"] + entry["v"] for entry in table.values() if entry["kind"] == "attention"]
    widths = sum(reduced) + (architecture.layers - len(reduced)) * whole
    return Size(parameters, total, widths * architecture.kv_heads * dtype.itemsize)


def byte_text(size: float) -> str:
    """Format bytes in the largest fitting unit."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.4g} {units[0]}"
