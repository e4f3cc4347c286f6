"""Time models in alternation, read their peak memory, and count the bytes and operations that bound their speed."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from lrc.benchmark.cases import Case
from lrc.benchmark.steps import Decode, Prefill

_WARM = 2  # samples that are not counted
_FEWEST = 3  # samples for quartiles


@dataclass(frozen=True)
class Timing:
    """Hold one model's result in one case.

    A sample is ``tokens`` tokens. ``seconds`` is the median, ``low_seconds`` and ``high_seconds`` are the quartiles
    (None below three samples). ``work`` is ``work_of`` a step. ``peak_bytes`` is the device memory of this model alone,
    None on a CPU.
    """

    tokens: int
    samples: int
    seconds: float
    low_seconds: float | None
    high_seconds: float | None
    work: int
    kv_bytes: int
    kv_bytes_per_token: int
    peak_bytes: int | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def spread(self) -> float | None:
        """Return the interquartile range over the median."""
        if self.low_seconds is None or self.high_seconds is None:
            return None
        return (self.high_seconds - self.low_seconds) / self.seconds

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return an interval of tokens per second; None without quartiles.

        Two models differ (at 95 %) if their intervals do not overlap: R. McGill, J. Tukey, W. Larsen, "Variations of
        Box Plots", 1978. The interval is the median ± 1.57 interquartile ranges over √n, at least ± half such a range.
        """
        if self.spread is None:
            return None
        half = self.tokens_per_second * self.spread * max(0.5, 1.57 / math.sqrt(self.samples))
        return self.tokens_per_second - half, self.tokens_per_second + half


@torch.no_grad()
def measure(
    models: Sequence[PreTrainedModel],
    cases: Sequence[Case],
    *,
    new_tokens: int,
    repeats: int,
    advance: Callable[[], object] = lambda: None,
) -> list[list[Timing]]:
    """Measure every model in every case, by case, then by model; the samples of a case alternate between models."""
    weights = [weigh(model) for model in models]
    found = []
    for case in cases:
        runs, peaks = [], []
        for model, weight in zip(models, weights, strict=True):
            on_gpu = model.device.type == "cuda"
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(model.device)
            before = torch.cuda.memory_allocated(model.device) if on_gpu else 0
            run = Prefill(model, case) if case.phase == "prefill" else Decode(model, case, new_tokens)
            for _ in range(_WARM):
                run.seconds()
            used = torch.cuda.max_memory_allocated(model.device) - before if on_gpu else 0
            peaks.append(weight.bytes + used if on_gpu else None)
            runs.append(run)
        seconds = [[run.seconds() for run in runs] for _ in range(repeats)]
        rows = []
        for run, weight, peak, taken in zip(runs, weights, peaks, zip(*seconds, strict=True), strict=True):
            held = cache_bytes(run.cache)
            low, median, high = _quartiles(taken)
            rows.append(
                Timing(
                    tokens=run.tokens,
                    samples=len(taken),
                    seconds=median,
                    low_seconds=low,
                    high_seconds=high,
                    work=work_of(case, weight, run.cache),
                    kv_bytes=held,
                    kv_bytes_per_token=held // (case.batch * case.length),
                    peak_bytes=peak,
                )
            )
        found.append(rows)
        del runs, run
        if case.mode == "compile":
            torch.compiler.reset()  # compiled code holds memory of this case
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        advance()
    return found


def _quartiles(seconds: Sequence[float]) -> tuple[float | None, float, float | None]:
    if len(seconds) < _FEWEST:
        return None, statistics.median(seconds), None
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, median, high


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
