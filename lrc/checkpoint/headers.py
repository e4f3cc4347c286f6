"""What the safetensors files of a checkpoint hold: read from their headers, checked against their length."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

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


def _read(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length + 8 > size:
            raise UserError(f"{file} is cut short or is no safetensors file: its header ends behind the file")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise UserError(f"{file} is damaged: its header cannot be read") from None
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        end = 8 + length + entry["data_offsets"][1]
        if end > size:
            raise UserError(f"{file} is cut short: tensor {name!r} ends at byte {end}, the file has {size}")
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{file}: tensor {name!r} is stored as {entry['dtype']}; lrc reads {', '.join(DTYPES)}"
            )
    start = 8 + length
    return {
        n: StoredTensor(tuple(e["shape"]), DTYPES[e["dtype"]], file, start + e["data_offsets"][0])
        for n, e in tensors.items()
    }
