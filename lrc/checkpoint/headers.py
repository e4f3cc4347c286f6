"""Read the headers of safetensors files and check them against the files' lengths."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrc.errors import UserError

Shape = tuple[int, ...]
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SAMPLE = 256  # bytes


@dataclass(frozen=True)
class StoredTensor:
    """Hold a tensor's shape, dtype and file; ``offset`` of its values in bytes, in safetensors files only."""

    shape: Shape
    dtype: torch.dtype
    file: Path
    offset: int = 0

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Return the offset of the first byte after the values."""
        return self.offset + self.bytes

    def sample(self) -> bytes:
        """Read a few values from the start and the middle, which tell models of the same shapes apart."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            start = stream.read(min(self.bytes, _SAMPLE))
            stream.seek(self.offset + self.bytes // 2)
            return start + stream.read(min(self.bytes // 2, _SAMPLE))


def read_headers(files: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """Read the tensors of safetensors files by name; raise UserError for a damaged file."""
    found = {}
    for file in map(Path, files):
        tensors, size = parse_header(file), file.stat().st_size
        for name, stored in sorted(tensors.items(), key=lambda item: item[1].offset):
            if stored.end > size:
                where = f"tensor {name!r} ends at byte {stored.end}, the file has {size}"
                raise UserError(f"{file} is cut short: {where}")
        found |= tensors
    return found


def check_shapes(expected: Mapping[str, Shape], stored: Mapping[str, StoredTensor]) -> None:
    """Raise UserError for the first tensor that is missing or has another shape than expected."""
    missing = [name for name in expected if name not in stored]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"the checkpoint lacks the tensor {missing[0]!r}{more}")
    for name, shape in expected.items():
        if (found := stored[name]).shape != shape:
            shapes = f"shape {list(found.shape)}, config.json says {list(shape)}"
            raise UserError(f"{found.file}: tensor {name!r} has {shapes}")


def parse_header(file: Path) -> dict[str, StoredTensor]:
    """Read the tensors that a safetensors header names, without checking that the file holds all of them.

    Raises UserError if the header is longer than the file, cannot be read or contradicts itself.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length + 8 > size:
            raise UserError(f"{file} is cut short or is no safetensors file: its header is too long")
        try:
            header = json.loads(stream.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            return {name: _stored(name, entry, file, 8 + length) for name, entry in entries.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{file} is damaged: its header cannot be read") from None


def _stored(name: str, entry: Mapping[str, Any], file: Path, values: int) -> StoredTensor:
    """Parse one entry of a header; the file's values start at byte ``values``."""
    (first, end), shape = map(int, entry["data_offsets"]), tuple(map(int, entry["shape"]))
    if entry["dtype"] not in DTYPES:
        known = ", ".join(DTYPES)
        raise UserError(f"{file}: tensor {name!r} is stored as {entry['dtype']}; lrc reads {known}")
    stored = StoredTensor(shape, DTYPES[entry["dtype"]], file, values + first)
    if first < 0 or end - first != stored.bytes:
        wrong = f"tensor {name!r} of shape {list(shape)} has {end - first} bytes"
        raise UserError(f"{file} is damaged: its header says that {wrong}")
    return stored
