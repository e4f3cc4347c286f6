"""Read a Hugging Face checkpoint lazily: names and shapes from headers, tensors one decoder layer at a time."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lrc.checkpoint.files import read_json, weight_files
from lrc.checkpoint.headers import StoredTensor, read_headers
from lrc.checkpoint.match import check_layers, check_match, match
from lrc.errors import UserError, nearest
from lrc.families import Architecture, Family, Target, describe, families, family_of

_SHARED = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


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

        ``tensors`` are those that transformers loads into the model of config.json; ``warnings`` name what it ignores.
        Raises UserError if the folder is no checkpoint of a supported causal language model, or a file is damaged. Also
        for a tensor that is missing or has another shape, for another quantization than ``quantized``, and for pickled
        weights without ``allow_pickle``.
        """
        self.folder, self._trust_remote_code = folder, trust_remote_code
        self.raw_config = read_json(folder / "config.json")
        if (generation := folder / "generation_config.json").is_file():
            read_json(generation)  # it is copied, and transformers loads no model beside some damaged ones
        self._check_quantization(quantized)
        # A multimodal model holds the decoder that is compressed; its other parts are left out.
        self._wrapped = (
            self.raw_config.get("model_type") not in families() and "text_config" in self.raw_config
        )
        if self._wrapped:
            self.raw_config = self._decoder_config()
        self.family: Family = family_of(self.raw_config.get("model_type", "(none)"))
        causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.family.model_type]
        architectures = self.raw_config.get("architectures") or [causal]
        if causal not in architectures:
            own = "AutoModelForCausalLM" in self.raw_config.get("auto_map", {})
            of_its_own = f"which is Python code of its own; lrc compresses {causal}"
            kind = of_its_own if own else f"not a causal language model ({causal})"
            raise UserError(f"{folder} is a {architectures[0]}, {kind}")
        named = self.raw_config.pop("transformers_weights", None)  # outputs have their weights in other files
        original = self.raw_config.get("quantization_config") is None
        weights = weight_files(folder, named if original else None)
        if weights.pickled and not allow_pickle:
            raise UserError(f"{folder} has only pickled weights ({weights.name}); pass --allow-pickle")
        self._pickles = {file: _unpickle(file) for file in weights.files} if weights.pickled else {}
        located = _of_pickles(self._pickles) if weights.pickled else read_headers(weights.files)
        self.warnings = [
            f"{folder} holds two sets of weights: {weights.name} is read, as by transformers, and {name} is not"
            for name in weights.ignored
        ]
        self._stored, self.tensors = {name: name for name in located}, located
        if original:
            self._match(located)

    @cached_property
    def config(self) -> Any:
        """Return the config in transformers' own type. Raises UserError for what transformers cannot read."""
        from transformers import AutoConfig

        with _blamed_on(self.folder / "config.json"):
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self._trust_remote_code)
            return config.get_text_config() if self._wrapped else config

    @cached_property
    def architecture(self) -> Architecture:
        shapes = {name: stored.shape for name, stored in self.tensors.items()}
        return describe(self.family, self.config, shapes)

    def empty_model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the config's causal language model on the meta device; buffers, such as rotary tables, are real."""
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        with (
            _blamed_on(self.folder / "config.json"),
            no_init_weights(),
            init_empty_weights(include_buffers=False),
        ):
            implementation = "sdpa" if self.family.sdpa else "eager"
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(self.config), dtype=dtype or self.dtype, attn_implementation=implementation
            ).eval()

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
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
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

    def _decoder_config(self) -> dict[str, Any]:
        """Return the config of a multimodal model's decoder. Raises UserError if lrc does not know it."""
        whole, text = self.raw_config, self.raw_config["text_config"]
        model_type = text.get("model_type") if isinstance(text, dict) else None
        if model_type not in families():
            raise UserError(
                f"{self.folder} is a {whole.get('model_type')}, which holds {model_type or 'no'} model for text; "
                f"{nearest(str(model_type), families())}"
            )
        shared = {key: whole[key] for key in _SHARED if key in whole}
        causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
        return {**shared, **text, "architectures": [causal]}

    def _check_quantization(self, expected: str | None) -> None:
        found = self.raw_config.get("quantization_config")
        if found is None:  # transformers reads null as no quantization
            return
        method = found.get("quant_method", "quantized") if isinstance(found, dict) else repr(found)
        if method != expected:
            raise UserError(
                f"{self.folder} is compressed already ({method}); name the full-precision original"
            )

    def _match(self, located: Mapping[str, StoredTensor]) -> None:
        """Choose the tensors of the model of config.json. Raises UserError if they do not fill it."""
        check_layers(located, self.family, self.config)
        model = self.empty_model(torch.float32)
        found = match(located, model, self.family)
        self._stored, self.tensors = (
            found.stored,
            {full: located[name] for full, name in found.stored.items()},
        )
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if self.config.tie_word_embeddings and self._tie(head := f"{self.family.head}.weight"):
            del shapes[head]
        check_match(found, located, shapes, self.config)
        if self._wrapped:
            self.warnings.append(
                f"{self.folder} holds more than a language model; only its decoder for text ({self.family.model_type}) "
                f"is compressed, and {len(found.unused)} tensors are left out"
            )
        elif found.unused:
            self.warnings.append(
                f"{self.folder} holds tensors that the model of config.json lacks; they are left out, as in "
                f"transformers: {', '.join(found.unused)}"
            )

    def _tie(self, head: str) -> bool:
        """Read one tensor as embedding and head; return False if the files hold both and they differ.

        transformers then keeps both, against its config, so the config is changed.
        """
        embedding = f"{self.family.embedding}.weight"
        if head not in self.tensors:
            return True
        if embedding in self.tensors:
            values = self._read([head, embedding])
            dtype = (
                getattr(self.config, "dtype", None) or values[embedding].dtype
            )  # in which transformers loads
            if not torch.equal(values[head].to(dtype), values[embedding].to(dtype)):
                self.config.tie_word_embeddings = self.raw_config["tie_word_embeddings"] = False
                self.warnings.append(
                    f"{self.folder}: config.json ties {head} to {embedding}, but the files hold both with different "
                    "values; both are kept, as in transformers, and the output says tie_word_embeddings: false"
                )
                return False
        else:
            self._stored[embedding], self.tensors[embedding] = self._stored[head], self.tensors[head]
        del self._stored[head], self.tensors[head]
        return True

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


def _unpickle(file: Path) -> dict[str, Tensor]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:  # torch, pickle and zip each raise their own
        reason = f"it is damaged or holds other objects, which lrc does not execute ({type(error).__name__})"
        raise UserError(f"{file} cannot be read as weights alone: {reason}") from error


def _of_pickles(pickles: Mapping[Path, Mapping[str, Tensor]]) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, file)
        for file, tensors in pickles.items()
        for name, tensor in tensors.items()
    }


@contextmanager
def _blamed_on(path: Path) -> Iterator[None]:
    """Turn what transformers raises for a config into UserError."""
    try:
        yield
    except Exception as error:  # transformers, huggingface_hub and the config classes each raise their own
        raise UserError(f"{path} does not work in transformers: {' '.join(str(error).split())}") from error
