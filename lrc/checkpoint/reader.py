"""Read a Hugging Face checkpoint lazily: names and shapes from headers, tensors one decoder layer at a time."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import Tensor

from lrc.checkpoint.headers import StoredTensor, read_headers
from lrc.errors import UserError
from lrc.families import Architecture, Family, Target, describe, family_of

_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"


class CheckpointReader:
    """Read a checkpoint, with tensor names as in its causal language model."""

    def __init__(
        self,
        folder: Path,
        *,
        quantized: str | None = None,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        """Open ``folder``; ``allow_pickle`` reads pickled weights with torch's ``weights_only``.

        Raises UserError if it is no checkpoint of a supported causal language model, a file is damaged, it is quantized
        by another method than ``quantized``, or its weights are pickled without ``allow_pickle``.
        """
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        self.folder, self._trust_remote_code = folder, trust_remote_code
        self.raw_config, self.config_text = _read_json(folder / "config.json")
        method = self.raw_config.get("quantization_config", {}).get("quant_method", "quantized")
        if "quantization_config" in self.raw_config and method != quantized:
            raise UserError(f"{folder} is compressed already ({method}); name the full-precision original")
        self.family: Family = family_of(self.raw_config.get("model_type", "(none)"))
        causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.family.model_type]
        named = self.raw_config.get("architectures") or [causal]
        if causal not in named:
            raise UserError(f"{folder} is a {named[0]}, not a causal language model ({causal})")
        self._pickles: dict[Path, dict[str, Tensor]] = {}
        located = self._locate(allow_pickle)
        self._stored = {
            full_name(name, self.family): name for name in located if not name.endswith(self.family.stale)
        }
        if self.config.tie_word_embeddings:  # some checkpoints store the embedding again as the head
            self._stored.pop(f"{self.family.head}.weight", None)
        self.tensors: dict[str, StoredTensor] = {full: located[name] for full, name in self._stored.items()}

    @cached_property
    def config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.folder, trust_remote_code=self._trust_remote_code)

    @cached_property
    def architecture(self) -> Architecture:
        shapes = {name: stored.shape for name, stored in self.tensors.items()}
        return describe(self.family, self.config, shapes)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Return the dtype of most stored bytes."""
        sizes: Counter[torch.dtype] = Counter()
        for stored in self.tensors.values():
            sizes[stored.dtype] += stored.bytes
        return sizes.most_common(1)[0][0]

    def weight(self, role: str, layer: int | None) -> StoredTensor:
        """Return what holds the weight of a role in a layer, or outside the layers if that is None."""
        family = self.family
        path = (
            family.outer[role]
            if layer is None
            else f"{family.layers}.{layer}.{family.projections[role].module}"
        )
        return self.tensors[f"{path}.weight"]

    def weight_bytes(self, target: Target, layer: int | None) -> float:
        """Return the mean bytes of a weight of a target."""
        each = [m.parameters * self.weight(role, layer).dtype.itemsize for role, m in target.matrices.items()]
        return sum(each) / target.parameters

    @property
    def files(self) -> list[Path]:
        return sorted({stored.file for stored in self.tensors.values()})

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of config.json and of every tensor's name, file, shape, dtype and a sample of values."""
        digest = hashlib.sha256(self.config_text.encode())
        for name, stored in sorted(self.tensors.items()):
            digest.update(f"{name} {stored.file.name} {stored.shape} {stored.dtype}".encode())
            digest.update(stored.sample())
        return digest.hexdigest()

    def layer(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of one decoder layer to the CPU, by their path in the layer."""
        start = f"{self.family.layers}.{index}."
        names = [name for name in self.tensors if name.startswith(start)]
        return {name.removeprefix(start): tensor for name, tensor in self._read(names).items()}

    def rest(self) -> dict[str, Tensor]:
        """Read all tensors outside the decoder layers, by full name."""
        return self._read(name for name in self.tensors if not name.startswith(f"{self.family.layers}."))

    def _locate(self, allow_pickle: bool) -> dict[str, StoredTensor]:
        """Find every tensor, by its name in the files."""
        for base in (_SAFETENSORS, _PICKLE):
            index, names = self.folder / f"{base}.index.json", [base]
            if index.exists():
                names = sorted(set(_read_json(index)[0]["weight_map"].values()))
            elif not (self.folder / base).exists():
                continue
            if base == _PICKLE and not allow_pickle:
                raise UserError(f"{self.folder} has only pickled weights ({names[0]}); pass --allow-pickle")
            files = [self.folder / name for name in names]
            missing = [file.name for file in files if not file.exists()]
            if missing:
                raise UserError(f"{index} names missing files: {', '.join(missing)}")
            if base == _SAFETENSORS:
                return read_headers(files)
            self._pickles = {file: _unpickle(file) for file in files}
            return {
                name: StoredTensor(tuple(tensor.shape), tensor.dtype, file)
                for file, tensors in self._pickles.items()
                for name, tensor in tensors.items()
            }
        raise UserError(f"{self.folder} has no weights: no {_SAFETENSORS} and no {_SAFETENSORS}.index.json")

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors to the CPU by name; open each file once."""
        files: dict[Path, list[str]] = {}
        for name in names:
            files.setdefault(self.tensors[name].file, []).append(name)
        found = {}
        for file, group in files.items():
            if file in self._pickles:
                found |= {name: self._pickles[file][self._stored[name]] for name in group}
                continue
            with safe_open(file, framework="pt") as tensors:
                found |= {name: tensors.get_tensor(self._stored[name]) for name in group}
        return found


def full_name(name: str, family: Family) -> str:
    """Return a tensor's name in the causal language model; base models omit the prefix."""
    return name if name.startswith((f"{family.prefix}.", f"{family.head}.")) else f"{family.prefix}.{name}"


def _unpickle(file: Path) -> dict[str, Tensor]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:  # torch, pickle and zip each raise their own
        reason = f"it is damaged or holds other objects, which lrc does not execute ({type(error).__name__})"
        raise UserError(f"{file} cannot be read as weights alone: {reason}") from error


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    """Return a JSON file's values and its text."""
    if not path.exists():
        raise UserError(f"{path.parent} is not a checkpoint: it has no {path.name}")
    text = path.read_text(encoding="utf-8")

    def refuse(name: str) -> None:
        raise json.JSONDecodeError(f"{name} is no value of JSON", text, text.index(name))

    try:
        return json.loads(text, parse_constant=refuse), text
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: line {error.lineno}: {error.msg}") from error
