"""Benchmarks as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lrc.benchmark.measure import Timing
from lrc.checkpoint.sizes import byte_text
from lrc.records.benchmark import Bench
from lrc.records.number import number
from lrc.report.table import table
from lrc.report.tables import warning_lines

if TYPE_CHECKING:
    from rich.console import RenderableType


def bench_tables(found: Bench) -> Iterator[RenderableType]:
    """Yield tokens per second and memory by case, of one model or of two with their ratios."""
    headings = ("model", "against")
    for title, side in zip(headings, (found.of, found.against), strict=True):
        if side is not None:
            how = f"{side.merged} merged products" if side.merged else "products one by one"
            yield f"{title}: {side.name}, {byte_text(side.weight_bytes)} of weights, {how}"
    speed, memory = [], []
    for row in found.rows:
        steps = found.new_tokens if row.case.phase == "decode" else 1
        times, sizes = {"case": str(row.case)}, {"case": str(row.case)}
        for title, side in zip(headings, (row.ours, row.theirs), strict=True):
            if side is None:
                continue
            times[f"tokens/s, {title}:n"] = _speed(side)
            times[f"ms, {title}:n"] = number(1e3 * side.seconds / steps)
            sizes[f"KV cache, {title}:n"] = f"{byte_text(side.kv_bytes)}, {side.kv_bytes_per_token:,} a token"
            if side.peak_bytes is not None:
                sizes[f"device peak, {title}:n"] = byte_text(side.peak_bytes)
        ratios = {"ratio:n": row.speedup, "expected:n": row.expected, "reached:n": row.reached}
        speed.append(times | {name: f"{ratio:.3f}" for name, ratio in ratios.items() if ratio is not None})
        memory.append(sizes)
    yield table(speed).on_screen()
    yield table(memory).on_screen()
    first = found.rows[0].ours
    samples = f"medians of {first.samples} samples" if first.samples > 1 else "one sample"
    if first.spread is not None:
        samples += " ± half the distance of their quartiles"
    yield (
        f"{found.device}, {found.dtype}; {samples}; a sample of decode is {found.new_tokens} "
        f"token{'s' * (found.new_tokens > 1)}; ms is the time to the first token, or of a step"
    )
    if found.against is not None:
        yield (
            "expected: the ratio of operations (prefill) or of bytes read (decode), the speedup if nothing else took "
            "time; reached: the ratio over expected"
        )
    yield from warning_lines(found.warnings)


def _speed(side: Timing) -> str:
    value = side.tokens_per_second
    spread = "" if side.spread is None else f" ±{side.spread / 2:.1%}"
    return number(value) + spread
