"""Results as tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from lrc.benchmark.measure import Measured
from lrc.checkpoint.sizes import byte_text
from lrc.evaluation.bootstrap import RESAMPLES, Estimate
from lrc.evaluation.pair import Pair
from lrc.evaluation.perplexity import Perplexity
from lrc.evaluation.tasks import TaskScore
from lrc.methods.sizes import size_text
from lrc.records.benchmark import Bench
from lrc.records.check import Check
from lrc.records.comparison import Comparison, Evaluated
from lrc.records.compression import Report
from lrc.report.rows import cost_table, listed, size_unit, targets_table
from lrc.report.table import Table, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lrc.records.catalogue import Item
    from lrc.records.integrity import Integrity
    from lrc.report.outputs import Source


def summary(report: Report) -> Iterator[RenderableType]:
    """What a compression did and what it cost."""
    yield targets_table(report.targets).on_screen()
    yield cost_table(report.before, report.after, report.perplexity).on_screen()
    if report.scale is not None:
        yield f"scale: {report.scale.text}"
    samples = report.calibration.samples
    yield f"calibration: {report.calibration.data} ({samples} block{'s' * (samples != 1)})"
    yield seconds_line(report.stages)
    yield "peak memory: " + listed({place: byte_text(size) for place, size in report.peak_bytes.items()})
    yield from warning_lines(report.warnings)
    yield f"wrote {report.out}"


def evaluation(comparison: Comparison) -> Iterator[RenderableType]:
    """Perplexity by text and length and scores on tasks of one model, or of two with what one lost."""
    of, against = comparison.of, comparison.against
    yield f"model: {of.model}"
    if against is not None:
        yield f"against: {against.model}"
    if of.perplexity:
        yield (_perplexity(of) if against is None else _ratios(comparison.pairs)).on_screen()
    if any(pair.tokens for pair in comparison.pairs):
        yield _token_by_token(comparison.pairs).on_screen()
        yield f"95 % intervals in brackets: {RESAMPLES:,} resamples of whole windows, both models' together"
    if of.tasks:
        yield _tasks(of, against).on_screen()
    yield from warning_lines(comparison.notes)


def outputs(sources: Iterable[Source]) -> Iterator[RenderableType]:
    """Outputs beside their original, a table a source."""
    from lrc.report.compared import outputs_table

    for source in sources:
        yield source.model
        yield outputs_table(source).on_screen()
        for text in source.texts:
            dense = text.dense
            yield f"{text.text}: perplexity, {dense.windows} windows of {dense.seq_len} tokens, {dense.dtype}"
        yield from warning_lines(source.notes)


def resolution(check: Check) -> Iterator[RenderableType]:
    """What a plan comes to for a model."""
    rows = [
        [
            row.layers,
            row.target,
            row.method,
            size_text(row.size) + size_unit(row.target, row.size),
            f"{row.kept:,}",
            f"{row.whole:,}",
            f"{row.kept / row.whole:.1%}",
        ]
        for row in check.targets
    ]
    memory, least, tables = check.memory, check.least_memory, check.with_tables
    yield table(
        ("layers", "target", "method", "size:n", "kept in each:n", "of:n", "keep:n"), rows
    ).on_screen()
    yield cost_table(check.before, check.after).on_screen()
    with_tables = f", {tables.keep:.2%} of {tables.weights}" if tables else ""
    yield f"kept: {check.keep:.2%} of the decoder's weights{with_tables}"
    yield (
        f"GPU memory for lrc compress: at most about {byte_text(memory.peak)}, an estimate ({memory.samples} blocks, "
        f"{memory.batch_size} at once, {memory.dtype}); "
        f"{byte_text(least.peak)} with --offload host or disk, where hidden states then take "
        f"{byte_text(memory.states)}{f' and gradients {byte_text(memory.gradients)}' if memory.gradients else ''}; "
        "perplexity is measured with the model whole where it fits, else a layer at a time"
    )
    yield from warning_lines(check.warnings)


def speeds(found: Bench) -> Iterator[RenderableType]:
    """Tokens per second and memory by case, of one model or of two with their ratios."""
    models = [side for side in (found.of, found.against) if side]
    pair = found.against is not None
    headings = ("model", "against") if pair else ("model",)
    for title, side in zip(headings, models, strict=True):
        how = f"{side.merged} merged products" if side.merged else "products one by one"
        yield f"{title}: {side.name}, {byte_text(side.weight_bytes)} of weights, {how}"
    peaks = any(row.ours.peak_bytes is not None for row in found.rows)
    speed, memory = [], []
    for row in found.rows:
        sides = [side for side in (row.ours, row.theirs) if side]
        steps = found.new_tokens if row.case.phase == "decode" else 1
        ratios = [f"{ratio:.3f}" for ratio in (row.speedup, row.expected, row.reached) if ratio is not None]
        times = [f"{1e3 * side.seconds / steps:.4g}" for side in sides]
        speed.append([str(row.case), *map(_speed, sides), *ratios, *times])
        caches = [f"{byte_text(s.kv_bytes)}, {s.kv_bytes_per_token:,} a token" for s in sides]
        at_most = [byte_text(s.peak_bytes) for s in sides if s.peak_bytes is not None]
        memory.append([str(row.case), *caches, *at_most])
    ratio_heads = ["ratio:n", "expected:n", "reached:n"] if pair else []
    heads = [*(f"tokens/s, {h}:n" for h in headings), *ratio_heads, *(f"ms, {h}:n" for h in headings)]
    yield table(["case", *heads], speed).on_screen()
    heads = [*(f"KV cache, {h}:n" for h in headings), *(f"device peak, {h}:n" for h in headings if peaks)]
    yield table(["case", *heads], memory).on_screen()
    first = found.rows[0].ours
    samples = f"medians of {first.samples} samples" if first.samples > 1 else "one sample"
    if first.spread is not None:
        samples += " ± half the distance of their quartiles"
    yield (
        f"{found.device}, {found.dtype}; {samples}; a sample of decode is {found.new_tokens} "
        f"token{'s' * (found.new_tokens > 1)}; ms is the time to the first token, or of a step"
    )
    if pair:
        yield (
            "expected: the ratio of operations (prefill) or of bytes read (decode), which is how much faster the model "
            "would be if nothing else took time; reached: the ratio over that"
        )
    yield from warning_lines(found.warnings)


def integrity(found: Integrity) -> Iterator[RenderableType]:
    """What was verified of an output that is sound."""
    yield f"sound: {found.folder}, {found.files} files, {found.tensors:,} tensors, {byte_text(found.bytes)}"


def overview(groups: Mapping[str, Iterable[Item]]) -> Iterator[RenderableType]:
    """Show the names in every group, a row each."""
    rows = [(group, ", ".join(item.name for item in items)) for group, items in groups.items()]
    yield table(("group", "names"), rows).on_screen()
    yield "lrc list GROUP shows one line and the source of each"


def catalogue_table(group: str, items: Iterable[Item]) -> RenderableType:
    """Show one group: a line for each item, and its source where any has one."""
    rows = [(item.name, item.summary, item.source) for item in items]
    sourced = any(source for *_, source in rows)
    heads = (group, "", "source") if sourced else (group, "")
    return table(heads, [row[: len(heads)] for row in rows]).on_screen()


def seconds_line(seconds: Mapping[str, float]) -> str:
    """Return seconds by stage in a line."""
    return "seconds: " + ", ".join(f"{stage} {each:.1f}" for stage, each in seconds.items())


def warning_lines(warnings: Iterable[str]) -> Iterator[str]:
    """Yield a line for each warning."""
    return (f"warning: {warning}" for warning in warnings)


def _perplexity(of: Evaluated) -> Table:
    rows = [
        [
            p.data,
            f"{p.value:.5g}",
            "" if p.bits_per_byte is None else f"{p.bits_per_byte:.4f}",
            str(p.windows),
            str(p.seq_len),
            p.dtype,
            f"{p.tokens_per_second:,.0f}",
        ]
        for p in of.perplexity
    ]
    heads = ("text", "perplexity:n", "bits per byte:n", "windows:n", "seq_len:n", "dtype", "tokens/s:n")
    return table(heads, rows)


def _ratios(pairs: Iterable[Pair]) -> Table:
    rows = []
    for pair in pairs:
        both = (pair.ours, pair.theirs)
        values = [f"{p.value:.5g}" if pair.same_tokens else _bits(p) for p in both]
        # What both have in common once, what differs of each.
        how = [
            ", ".join(dict.fromkeys(str(getattr(p, key)) for p in both))
            for key in ("windows", "seq_len", "dtype")
        ]
        rows.append([pair.ours.data, *values, "" if pair.ratio is None else f"{pair.ratio:.4f}", *how])
    return table(("text", "model:n", "against:n", "ratio:n", "windows:n", "seq_len:n", "dtype"), rows)


def _tasks(of: Evaluated, against: Evaluated | None) -> Table:
    """Scores with their standard errors, and where there is another model its own and the difference."""
    others = {(s.task, s.metric, s.filter): s for s in (against.tasks if against else [])}
    rows = []
    for score in of.tasks:
        name = score.metric if score.filter == "none" else f"{score.metric}, {score.filter}"
        better = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
        counts = ["" if n is None else str(n) for n in (score.shots, score.documents)]
        cells = [score.task, f"{name}{better}", *counts, _score(score)]
        if other := others.get((score.task, score.metric, score.filter)):
            cells += [_score(other), f"{score.value - other.value:+.4f}"]
        rows.append(cells)
    heads = ["task", "metric", "shots:n", "documents:n", "model:n"]
    return table([*heads, *(["against:n", "difference:n"] if against else [])], rows)


def _score(score: TaskScore) -> str:
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")


def _token_by_token(pairs: Iterable[Pair]) -> Table:
    """What the model loses of the one it is held against, on the same tokens."""
    rows = [
        [
            pair.ours.data,
            str(pair.ours.seq_len),
            _interval(found.perplexity_ratio, "{:.4f}"),
            _interval(found.kl_mean, "{:.4g}"),
            _interval(found.kl_p99, "{:.4g}"),
            _interval(found.top1_agreement, "{:.2%}"),
        ]
        for pair in pairs
        if (found := pair.tokens)
    ]
    heads = ("text", "seq_len:n", "perplexity ratio:n", "KL, mean:n", "KL, 99 %:n", "top-1 agreement:n")
    return table(heads, rows)


def _interval(estimate: Estimate, form: str) -> str:
    ends = [end for end in (estimate.low, estimate.high) if end is not None]
    within = f"\n[{', '.join(form.format(end) for end in ends)}]" if ends else ""
    return f"{form.format(estimate.value)}{within}"


def _bits(p: Perplexity) -> str:
    bits = "" if p.bits_per_byte is None else f" ({p.bits_per_byte:.4f} bits per byte)"
    return f"{p.value:.5g}{bits}"


def _speed(side: Measured) -> str:
    value = side.tokens_per_second
    spread = "" if side.spread is None else f" ±{side.spread / 2:.1%}"
    return (f"{value:,.0f}" if value >= 1000 else f"{value:.4g}") + spread
