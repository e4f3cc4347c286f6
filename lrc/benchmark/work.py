"""Count the bytes that a model's step reads and the multiplications that it does: they bound its speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import Cache

from lrc.benchmark.cases import Case


@dataclass(frozen=True)
class Weights:
    """Hold a model's tensor bytes, the bytes read by a decode step, and the multiplications a token and a head take."""

    bytes: int
    read: int
    products: int
    head_products: int
    heads: int


def weigh(model: Any) -> Weights:
    """Count a model's weights; an embedding is looked up, not read, unless the LM head shares its weight."""
    head, read, products = model.get_output_embeddings(), 0, 0
    in_head = set() if head is None else set(head.modules())
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            # A weight shared by a factorized embedding and the head is read once, but multiplied by both.
            read += parameter.nbytes if id(parameter) not in seen else 0
            seen.add(id(parameter))
            if parameter.ndim > 1 and module not in in_head:
                products += parameter.numel()
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    in_last = 0 if head is None else sum(p.numel() for p in head.parameters() if p.ndim > 1)
    return Weights(sum(tensors.values()), read, products, in_last, model.config.num_attention_heads)


def cache_bytes(cache: Cache) -> int:
    """Return the bytes allocated for a cache's keys and values."""
    layers: Any = cache.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def work_of(case: Case, weights: Weights, cache: Cache) -> int:
    """Return the bytes that a decode step reads, or the floating-point operations of a prefill."""
    if case.phase == "decode":
        return weights.read + cache_bytes(cache)
    layers: Any = cache.layers
    widths = sum(layer.keys.shape[-1] + layer.values.shape[-1] for layer in layers)
    pairs = case.length * (case.length + 1) // 2  # of a token and a token that it attends to
    products = case.length * weights.products + weights.head_products + pairs * weights.heads * widths
    return 2 * case.batch * products
