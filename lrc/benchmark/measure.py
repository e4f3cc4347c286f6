"""Time models against each other, with samples taken in turn, and read their peak memory."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lrc.benchmark.cases import Case
from lrc.benchmark.steps import Decode, Prefill
from lrc.benchmark.work import cache_bytes, weigh, work_of

_WARM = 2  # samples that are not counted
_FEWEST = 3  # samples for quartiles


@dataclass(frozen=True)
class Measured:
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


@torch.no_grad()
def measure(
    models: Sequence[PreTrainedModel],
    cases: Sequence[Case],
    *,
    new_tokens: int,
    repeats: int,
    advance: Callable[[], object] = lambda: None,
) -> list[list[Measured]]:
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
                Measured(
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
