"""Results as tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from rich.table import Table

from lrc.benchmark.measure import Measured
from lrc.checkpoint.sizes import Size, byte_text
from lrc.evaluation.bootstrap import RESAMPLES, Estimate
from lrc.evaluation.pair import Pair
from lrc.evaluation.perplexity import Perplexity
from lrc.evaluation.tasks import TaskScore
from lrc.methods.sizes import size_text
from lrc.records.benchmark import Bench, Row
from lrc.records.check import Check
from lrc.records.comparison import Comparison, Evaluated
from lrc.records.compression import Report
from lrc.report.groups import size_unit, summarise

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lrc.records.catalogue import Item
    from lrc.records.integrity import Integrity
    from lrc.report.outputs import OnText, Source


def summary(report: Report) -> Iterator[RenderableType]:
    """What a compression did and what it cost."""
    targets = _table(
        "target", "method", "layers:r", "size:r", "kept:r", "predicted error:r", "measured error:r"
    )
    for group in summarise(report.targets):
        targets.add_row(
            group.target,
            group.method,
            str(group.layers),
            group.size_text,
            f"{group.kept:,} ({group.kept / group.whole:.1%})",
            group.predicted_text,
            group.measured_text,
        )
    cost = _cost(report.before, report.after)
    for change in report.perplexity:
        before, after = change.before, change.after
        label = f"perplexity, {before.data} ({before.windows} x {before.seq_len} tokens)"
        cost.add_row(label, f"{before.value:.4g}", f"{after.value:.4g}", f"{change.ratio:.3f}")
    yield targets
    yield cost
    if report.scale is not None:
        yield f"scale: {report.scale.text}"
    samples = report.calibration.samples
    yield f"calibration: {report.calibration.data} ({samples} block{'s' * (samples != 1)})"
    yield "seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in report.stages.items())
    yield "peak memory: " + ", ".join(
        f"{place} {byte_text(size)}" for place, size in report.peak_bytes.items()
    )
    yield from _warnings(report.warnings)
    yield f"wrote {report.out}"


def evaluation(comparison: Comparison) -> Iterator[RenderableType]:
    """Perplexity by text and length and scores on tasks of one model, or of two with what one lost."""
    of, against = comparison.of, comparison.against
    yield f"model: {of.model}"
    if against is None:
        table = _table(
            "text", "perplexity:r", "bits per byte:r", "windows:r", "seq_len:r", "dtype", "tokens/s:r"
        )
        for p in of.perplexity:
            bits = "" if p.bits_per_byte is None else f"{p.bits_per_byte:.4f}"
            speed = f"{p.tokens_per_second:,.0f}"
            table.add_row(p.data, f"{p.value:.5g}", bits, str(p.windows), str(p.seq_len), p.dtype, speed)
    else:
        yield f"against: {against.model}"
        table = _table("text", "model:r", "against:r", "ratio:r", "windows:r", "seq_len:r", "dtype")
        for pair in comparison.pairs:
            both = (pair.ours, pair.theirs)
            table.add_row(
                pair.ours.data,
                *(f"{p.value:.5g}" if pair.same_tokens else _bits(p) for p in both),
                "" if pair.ratio is None else f"{pair.ratio:.4f}",
                *(_once(getattr(p, key) for p in both) for key in ("windows", "seq_len", "dtype")),
            )
    if of.perplexity:
        yield table
    if any(pair.tokens for pair in comparison.pairs):
        yield _token_by_token(comparison.pairs)
        yield f"95 % intervals in brackets: {RESAMPLES:,} resamples of whole windows, both models' together"
    if of.tasks:
        yield _tasks(of, against)
    yield from _warnings(comparison.notes)


def outputs(sources: Iterable[Source]) -> Iterator[RenderableType]:
    """Outputs beside their original, a table a source."""
    for source in sources:
        before = source.before
        heads = [heading for text in source.texts for heading in (f"{_measured_on(text)}:r", "ratio:r")]
        table = _table(
            "output", "method", "keep:r", "size:r", "ratio:r", "KV cache, bytes/token:r", *heads, "seconds:r"
        )
        dense = [cell for text in source.texts for cell in (f"{text.dense.value:.4g}", "1.000")]
        size = (byte_text(before.bytes), "1.000", f"{before.kv_bytes_per_token:,}")
        table.add_row(source.model, "", "100.0%", *size, *dense, "")
        for i, output in enumerate(source.outputs):
            report = output.report
            changes = [text.changes.get(i) for text in source.texts]
            table.add_row(
                output.label,
                output.method,
                f"{report.keep:.1%}",
                byte_text(report.after.bytes),
                f"{report.after.bytes / before.bytes:.3f}",
                f"{report.after.kv_bytes_per_token:,}",
                *(
                    cell
                    for change in changes
                    for cell in (
                        ("", "") if change is None else (f"{change.after.value:.4g}", f"{change.ratio:.3f}")
                    )
                ),
                f"{output.seconds:.1f}",
            )
        yield table
        yield from _warnings(source.notes)


def _measured_on(text: OnText) -> str:
    """What a column holds; a name that stands for several texts says their windows itself."""
    windows = f"\n{text.dense.windows} x {text.dense.seq_len} tokens" if text.text == text.dense.data else ""
    return f"perplexity, {text.text}{windows}"


def _tasks(of: Evaluated, against: Evaluated | None) -> Table:
    """Scores with their standard errors, and where there is another model its own and the difference."""
    table = _table(
        "task",
        "metric",
        "shots:r",
        "documents:r",
        "model:r",
        *(["against:r", "difference:r"] if against else []),
    )
    others = {(s.task, s.metric, s.filter): s for s in (against.tasks if against else [])}
    for score in of.tasks:
        name = score.metric if score.filter == "none" else f"{score.metric}, {score.filter}"
        better = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
        cells = [
            score.task,
            f"{name}{better}",
            *("" if n is None else str(n) for n in (score.shots, score.documents)),
        ]
        cells.append(_score(score))
        if other := others.get((score.task, score.metric, score.filter)):
            cells += [_score(other), f"{score.value - other.value:+.4f}"]
        table.add_row(*cells)
    return table


def _score(score: TaskScore) -> str:
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")


def _token_by_token(pairs: Iterable[Pair]) -> Table:
    """What the model loses of the one it is held against, on the same tokens."""
    table = _table("text", "seq_len:r", "perplexity ratio:r", "KL, mean:r", "KL, 99 %:r", "top-1 agreement:r")
    for pair in pairs:
        if found := pair.tokens:
            table.add_row(
                pair.ours.data,
                str(pair.ours.seq_len),
                _interval(found.perplexity_ratio, "{:.4f}"),
                _interval(found.kl_mean, "{:.4g}"),
                _interval(found.kl_p99, "{:.4g}"),
                _interval(found.top1_agreement, "{:.2%}"),
            )
    return table


def _interval(estimate: Estimate, form: str) -> str:
    ends = [end for end in (estimate.low, estimate.high) if end is not None]
    within = f"\n[{', '.join(form.format(end) for end in ends)}]" if ends else ""
    return f"{form.format(estimate.value)}{within}"


def resolution(check: Check) -> Iterator[RenderableType]:
    """What a plan comes to for a model."""
    targets = _table("layers", "target", "method", "size:r", "kept in each:r", "of:r", "keep:r")
    for row in check.targets:
        targets.add_row(
            row.layers,
            row.target,
            row.method,
            size_text(row.size) + size_unit(row.target, row.size),
            f"{row.kept:,}",
            f"{row.whole:,}",
            f"{row.kept / row.whole:.1%}",
        )
    memory, least = check.memory, check.least_memory
    yield targets
    yield _cost(check.before, check.after)
    tables = check.with_tables
    with_tables = f", {tables.keep:.2%} of {tables.weights}" if tables else ""
    yield f"kept: {check.keep:.2%} of the decoder's weights{with_tables}"
    yield (
        f"GPU memory for lrc compress: about {byte_text(memory.peak)}, an estimate ({memory.samples} blocks, "
        f"{memory.batch_size} at once, {memory.dtype}; the most is in stage {memory.stage}); "
        f"{byte_text(least.peak)} with --states host or disk, where hidden states then take "
        f"{byte_text(memory.states)}{f' and gradients {byte_text(memory.gradients)}' if memory.gradients else ''}; "
        "perplexity is measured with the model whole where it fits, else a layer at a time"
    )
    yield from _warnings(check.warnings)


def speeds(found: Bench) -> Iterator[RenderableType]:
    """Tokens per second and memory by case, of one model or of two with their ratios."""
    models = [side for side in (found.of, found.against) if side]
    for title, side in zip(("model", "against"), models, strict=False):
        how = f"{side.merged} merged products" if side.merged else "products one by one"
        yield f"{title}: {side.name}, {byte_text(side.weight_bytes)} of weights, {how}"
    pair = found.against is not None
    peaks = any(row.ours.peak_bytes is not None for row in found.rows)
    ratios = ["ratio:r", "expected:r", "reached:r"] if pair else []
    headings = ("model", "against") if pair else ("model",)
    speed = _table(
        "case", *(f"tokens/s, {h}:r" for h in headings), *ratios, *(f"ms, {h}:r" for h in headings)
    )
    memory = _table(
        "case",
        *(f"KV cache, {h}:r" for h in headings),
        *(f"device peak, {h}:r" for h in headings if peaks),
    )
    for row in found.rows:
        sides = [side for side in (row.ours, row.theirs) if side]
        steps = found.new_tokens if row.case.phase == "decode" else 1
        speed.add_row(
            str(row.case),
            *map(_speed, sides),
            *_ratios(row),
            *(f"{1e3 * s.seconds / steps:.4g}" for s in sides),
        )
        memory.add_row(
            str(row.case),
            *(f"{byte_text(s.kv_bytes)}, {s.kv_bytes_per_token:,} a token" for s in sides),
            *(byte_text(s.peak_bytes) for s in sides if s.peak_bytes is not None),
        )
    yield speed
    yield memory
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
    yield from _warnings(found.warnings)


def integrity(found: Integrity) -> Iterator[RenderableType]:
    """What was verified of an output that is sound."""
    yield f"sound: {found.folder}, {found.files} files, {found.tensors:,} tensors, {byte_text(found.bytes)}"


def catalogue_tables(groups: Mapping[str, Iterable[Item]]) -> Iterator[RenderableType]:
    """What lrc knows, a table a group."""
    for group, items in groups.items():
        rows = [(item.name, item.summary, item.source) for item in items]
        sourced = any(source for *_, source in rows)
        table = _table(group, "", *(["source"] if sourced else []))
        for row in rows:
            table.add_row(*row[: 3 if sourced else 2])
        yield table


def _bits(p: Perplexity) -> str:
    bits = "" if p.bits_per_byte is None else f" ({p.bits_per_byte:.4f} bits per byte)"
    return f"{p.value:.5g}{bits}"


def _speed(side: Measured) -> str:
    value = side.tokens_per_second
    spread = "" if side.spread is None else f" ±{side.spread / 2:.1%}"
    return (f"{value:,.0f}" if value >= 1000 else f"{value:.4g}") + spread


def _ratios(row: Row) -> list[str]:
    return [f"{ratio:.3f}" for ratio in (row.speedup, row.expected, row.reached) if ratio is not None]


def _once(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _cost(before: Size, after: Size) -> Table:
    table = _table("", "before:r", "after:r", "ratio:r")
    for name, key, shown in (
        ("parameters", "parameters", "{:,}".format),
        ("bytes", "bytes", byte_text),
        ("KV cache, bytes per token", "kv_bytes_per_token", "{:,}".format),
    ):
        old, new = getattr(before, key), getattr(after, key)
        table.add_row(name, shown(old), shown(new), f"{new / old:.3f}")
    return table


def _table(*columns: str) -> Table:
    """A table by its headings; those that end in ``:r`` hold numbers, flush right."""
    table = Table(title_justify="left")
    for column in columns:
        heading = column.removesuffix(":r")
        table.add_column(heading, justify="left" if heading == column else "right", overflow="fold")
    return table


def _warnings(warnings: Iterable[str]) -> Iterator[str]:
    return (f"warning: {warning}" for warning in warnings)
