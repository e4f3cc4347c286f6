"""What a step of a model has to do: bytes that it reads, products that it multiplies; the yardstick for its speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import Cache

from lrc.benchmark.cases import Case


@dataclass(frozen=True)
class Weights:
    """Of a loaded model: bytes of all tensors, bytes that a token's step reads, multiplications that a token and a
    sequence's last token (its head) take.
    """

    bytes: int
    read: int
    products: int
    head_products: int
    heads: int


def weigh(model: Any) -> Weights:
    """Count a model's weights. Tables of embeddings are looked up, not read, but for one that is the head's weight."""
    head, read, products = model.get_output_embeddings(), 0, 0
    in_head = set() if head is None else set(head.modules())
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            # A weight that a factorized embedding and the head share is read once and multiplied by both.
            read += parameter.nbytes if id(parameter) not in seen else 0
            seen.add(id(parameter))
            if parameter.ndim > 1 and module not in in_head:
                products += parameter.numel()
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    in_last = 0 if head is None else sum(p.numel() for p in head.parameters() if p.ndim > 1)
    return Weights(sum(tensors.values()), read, products, in_last, model.config.num_attention_heads)


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache holds room for."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in _layers(cache))


def work_of(case: Case, weights: Weights, cache: Cache) -> int:
    """Bytes that a step of decode reads, or floating-point operations of a prefill's products and attention."""
    if case.phase == "decode":
        return weights.read + cache_bytes(cache)
    widths = sum(layer.keys.shape[-1] + layer.values.shape[-1] for layer in _layers(cache))
    pairs = case.batch * case.length * (case.length + 1) // 2  # of a token and one that it attends to
    tokens = case.batch * case.length
    return 2 * (
        tokens * weights.products + case.batch * weights.head_products + pairs * weights.heads * widths
    )


def _layers(cache: Cache) -> Any:
    return cache.layers
