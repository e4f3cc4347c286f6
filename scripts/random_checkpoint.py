"""Writes a checkpoint of a given architecture with random weights, for speed and memory work.

    python scripts/random_checkpoint.py llama-7b --out llama-7b-random --dtype bfloat16 --device cuda

One shard a layer, written as it is drawn, so memory is bounded by one layer. Every tensor is drawn from the
seed and its own name.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "vocab_size": 32000,
    },
    "llama-13b": {
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 2048,
        "vocab_size": 32000,
    },
    "llama-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
    },
    "llama-405b": {
        "model_type": "llama",
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "vocab_size": 128256,
    },
    "gpt2": {"model_type": "gpt2"},
    "small": {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 512,
        "vocab_size": 8192,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": 8192,
    },
}
TOKENIZER = Path(__file__).parents[1] / "lrc" / "assets" / "tiny-llama"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt")
RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "c_proj.weight")
STD = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--layers", type=int, help="write this many layers instead of all")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cpu", help="where numbers are drawn; cuda is much faster")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="folder to copy a tokenizer from")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists")
    if not (arguments.tokenizer / "tokenizer.json").is_file():
        parser.error(f"{arguments.tokenizer} has no tokenizer.json")
    started = time.perf_counter()
    size = write(
        arguments.out,
        configuration(arguments.shape, arguments.layers, arguments.dtype),
        getattr(torch, arguments.dtype),
        torch.device(arguments.device),
        arguments.seed,
    )
    for pattern in TOKENIZER_FILES:
        for file in arguments.tokenizer.glob(pattern):
            shutil.copy(file, arguments.out)
    print(f"wrote {arguments.out}: {size / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s")


def configuration(shape: str, layers: int | None, dtype: str) -> PreTrainedConfig:
    """The config of a named shape, with fewer layers if asked."""
    config = AutoConfig.for_model(**SHAPES[shape])
    if layers is not None:
        config.num_hidden_layers = layers
    config.dtype = dtype
    return config


def write(out: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int) -> int:
    """Write config, shards and index to a new folder; return the bytes of its tensors."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    out.mkdir(parents=True)
    config.save_pretrained(out)
    shards = [
        list(group) for _, group in groupby(model.named_parameters(), key=lambda item: layer_of(item[0]))
    ]
    residual_std = STD / (2 * config.num_hidden_layers) ** 0.5
    weight_map, size = {}, 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = dict(draw(shard, residual_std, dtype, device, seed))
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return size


def layer_of(name: str) -> str:
    """The number of the layer that a tensor belongs to; empty outside the layers."""
    found = re.search(r"\.(\d+)\.", name)
    return found[1] if found else ""


def draw(
    shard: list[tuple[str, Tensor]], residual_std: float, dtype: torch.dtype, device: torch.device, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Draw one shard as a model's initialisation would: norms one, biases zero, matrices normal."""
    for name, shape_only in shard:
        tensor = torch.empty(shape_only.shape, dtype=dtype, device=device)
        if name.endswith("bias"):
            tensor.zero_()
        elif tensor.ndim == 1:
            tensor.fill_(1.0)
        else:
            generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            std = residual_std if name.endswith(RESIDUAL_OUTPUTS) else STD
            tensor.normal_(0.0, std, generator=generator)
        yield name, tensor.cpu()


if __name__ == "__main__":
    main()
