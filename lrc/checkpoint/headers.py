"""What the safetensors files of a checkpoint hold: read from their headers, checked against their length."""

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
_SAMPLE = 256


@dataclass(frozen=True)
class StoredTensor:
    """Shape and precision of one tensor, the file that holds it and, in safetensors, where in it the values begin."""

    shape: Shape
    dtype: torch.dtype
    file: Path
    offset: int = 0

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """The first byte of the file behind its values."""
        return self.offset + self.bytes

    def sample(self) -> bytes:
        """A few values from the start and the middle: enough to tell apart models of the same shapes."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            start = stream.read(min(self.bytes, _SAMPLE))
            stream.seek(self.offset + self.bytes // 2)
            return start + stream.read(min(self.bytes // 2, _SAMPLE))


def read_headers(files: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """Every tensor of some safetensors files by name; UserError names a file that is damaged."""
    found = {}
    for file in map(Path, files):
        found |= _read(file)
    return found


def check_shapes(expected: Mapping[str, Shape], stored: Mapping[str, StoredTensor]) -> None:
    """Raise UserError for the first tensor that is not stored, or has another shape than its module."""
    missing = [name for name in expected if name not in stored]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"the checkpoint lacks the tensor {missing[0]!r}{more}")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise UserError(
                f"{stored[name].file}: tensor {name!r} has shape {list(stored[name].shape)}, "
                f"config.json says {list(shape)}"
            )


def parse_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor that a safetensors file's header names, whether or not the file goes on as far.

    Raises UserError where the header ends behind the file, cannot be read or contradicts itself.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length + 8 > size:
            raise UserError(f"{file} is cut short or is no safetensors file: its header ends behind the file")
        try:
            header = json.loads(stream.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            return {name: _stored(name, entry, file, 8 + length) for name, entry in entries.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{file} is damaged: its header cannot be read") from None


def _read(file: Path) -> dict[str, StoredTensor]:
    tensors, size = parse_header(file), file.stat().st_size
    for name, stored in sorted(tensors.items(), key=lambda item: item[1].offset):
        if stored.end > size:
            raise UserError(
                f"{file} is cut short: tensor {name!r} ends at byte {stored.end}, the file has {size}"
            )
    return tensors


def _stored(name: str, entry: Mapping[str, Any], file: Path, values: int) -> StoredTensor:
    """One entry of a header whose file has its values from byte ``values`` on."""
    (first, end), shape = map(int, entry["data_offsets"]), tuple(map(int, entry["shape"]))
    if entry["dtype"] not in DTYPES:
        raise UserError(
            f"{file}: tensor {name!r} is stored as {entry['dtype']}; lrc reads {', '.join(DTYPES)}"
        )
    stored = StoredTensor(shape, DTYPES[entry["dtype"]], file, values + first)
    if first < 0 or end - first != stored.bytes:
        raise UserError(
            f"{file} is damaged: its header says that tensor {name!r} of shape {list(shape)} has {end - first} bytes"
        )
    return stored
