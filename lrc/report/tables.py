"""Compressions as tables for every page; checks and lists of names as tables for a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lrc.checkpoint.sizes import Size, byte_text
from lrc.compression.measure import Measured
from lrc.evaluation.answers import NEW_TOKENS, Answers, Written
from lrc.evaluation.bootstrap import FEW, Estimate
from lrc.evaluation.domains import WINDOW
from lrc.evaluation.last_words import LastWords
from lrc.methods.contract import Prediction
from lrc.methods.sizes import SizeValue, size_text
from lrc.records.check import Check, Item
from lrc.records.compression import Domains, PerplexityChange, Report, TargetRecord
from lrc.records.number import number, ratio_text
from lrc.report.table import Table, grouped, table

if TYPE_CHECKING:
    from rich.console import RenderableType


def compression_tables(report: Report) -> Iterator[RenderableType]:
    """Yield what a compression did and what it cost."""
    yield targets_table(report.targets).on_screen()
    yield cost_table(report.before, report.after, report.perplexity, report.last_words).on_screen()
    for change in report.perplexity:
        yield from change.notes
    if report.domains.changes:
        yield domains_table(report.domains).on_screen()
    yield from report.domains.skipped
    if report.answers:
        if report.answers.answers:
            yield answers_table(report.answers).on_screen()
        yield from report.answers.skipped
    if report.scale is not None:
        yield f"scale: {report.scale.text}"
    samples = report.calibration.samples
    yield f"calibration: {report.calibration.data} ({samples} block{'s' * (samples != 1)})"
    yield seconds_line(report.stages)
    yield "peak memory: " + listed({place: byte_text(size) for place, size in report.peak_bytes.items()})
    yield f"wrote {report.out}"


def cost_table(
    before: Size,
    after: Size,
    perplexity: Iterable[PerplexityChange] = (),
    words: LastWords | None = None,
) -> Table:
    """Return parameters, bytes, cache, perplexity and last words before and after, and how far predictions moved."""

    def row(name: str, old: str, new: str, ratio: float) -> dict[str, str]:
        return {":w": name, "before:n": old, "after:n": new, "ratio:n": ratio_text(ratio)}

    rows = [
        row(name, shown(old), shown(new), new / old)
        for name, shown, old, new in (
            ("parameters", "{:,}".format, before.parameters, after.parameters),
            ("bytes", byte_text, before.bytes, after.bytes),
            ("KV cache, bytes per token", "{:,}".format, before.kv_bytes_per_token, after.kv_bytes_per_token),
        )
    ]
    for change in perplexity:
        old, new = change.before, change.after
        label = f"perplexity, {old.data} ({old.windows} × {old.seq_len} tokens, {old.dtype})"
        rows.append(row(label, number(old.value), number(new.value), change.ratio))
        if found := change.tokens:
            rows[-1] |= _interval_cell(found.perplexity_ratio, ratio_text)
        if old.bits_per_byte is not None and new.bits_per_byte is not None:
            ratio = new.bits_per_byte / old.bits_per_byte if old.bits_per_byte else math.nan
            bits = f"{old.bits_per_byte:.4f}", f"{new.bits_per_byte:.4f}"
            rows.append(row(f"bits per byte, {old.data}", *bits, ratio))
        if found := change.tokens:
            for name, estimate, form in (
                ("KL divergence from the original, nats per token", found.kl_mean, lambda v: number(v, 3)),
                ("KL divergence, 99th percentile", found.kl_p99, lambda v: number(v, 3)),
                ("same top token as the original", found.top1_agreement, "{:.1%}".format),
            ):
                cells = {":w": f"{name}, {old.data}", "after:n": form(estimate.value)}
                rows.append(cells | _interval_cell(estimate, form))
    if words:
        name = f"LAMBADA, {words.passages} of the first {words.asked} passages, last word"
        both = number(words.perplexity_before), number(words.perplexity_after)
        rows.append(row(f"{name}: perplexity", *both, words.perplexity_ratio.value))
        rows[-1] |= {"95 % interval": words.perplexity_ratio.between(ratio_text)}
        shares = {"before:n": f"{words.accuracy_before:.1%}", "after:n": f"{words.accuracy_after:.1%}"}
        change = words.accuracy_change.between(lambda share: f"{100 * share:+.1f}")
        rows.append(
            {":w": f"{name}: accuracy", **shares} | ({"95 % interval": f"{change} points"} if change else {})
        )
    return table(rows)


def domains_table(found: Domains) -> Table:
    """Return a row for each domain: perplexity before and after, and how often both rank the same token first."""
    rows = []
    for name, change in found.changes.items():
        row = {
            "domain": name + (": much worse" if name in found.much_worse else ""),
            "before:n": number(change.before.value),
            "after:n": number(change.after.value),
            "ratio:n": ratio_text(change.ratio),
        }
        if tokens := change.tokens:
            row |= _interval_cell(tokens.perplexity_ratio, ratio_text)
            row |= {"same top token:n": f"{tokens.top1_agreement.value:.1%}"}
        rows.append(row | {"windows:n:m": f"{change.before.windows}"})
    return table(
        rows,
        f"Perplexity by domain, in windows of at most {WINDOW} tokens. The texts were written for lrc and are in none "
        f"of its calibration texts. With fewer than {FEW} windows the intervals cover the true value less often than "
        "stated.",
    )


def ratio_cell(change: PerplexityChange) -> str:
    """Return the ratio of perplexities with its interval below, if there is one."""
    interval = change.tokens and change.tokens.perplexity_ratio.between(ratio_text)
    return ratio_text(change.ratio) + (f"\n{interval}" if interval else "")


def _interval_cell(estimate: Estimate, form: Callable[[float], str]) -> dict[str, str]:
    return {"95 % interval": estimate.between(form) or "none: 1 window"}


def answers_table(found: Answers) -> Table:
    """Return a row for each prompt with the answers before and after."""
    how = "Prompts through the chat template" if found.chat else "Prompts continued as plain text"
    return table(
        (
            {"prompt:w": each.prompt, "before:w": _written(each.before), "after:w": _written(each.after)}
            for each in found.answers
        ),
        f"{how}, answered with the most likely tokens: at most {NEW_TOKENS} new ones. … marks an answer "
        "that was cut there; the model itself ended the others.",
    )


def _written(answer: Written) -> str:
    """Return a text as one line, without the control characters that a damaged model may write."""
    line = re.sub(r"\s*[\r\n]\s*", " ↵ ", answer.text)
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", line) + ("" if answer.ended else " …")


def targets_table(records: Iterable[TargetRecord]) -> Table:
    """Return a row for each target, method and metric of its prediction, over the layers.

    Relative errors are root mean squares over the layers, nats their means.
    """
    groups = grouped(records, lambda record: (record.target, record.method, record.predicted.metric))
    return table(
        {
            "target": target,
            **_outcome(some),
            "method": method,
            "layers:n:m": f"{sum(r.layer is not None for r in some)}",
        }
        for (target, method, _), some in groups.items()
    )


def every_table(records: Iterable[TargetRecord]) -> Table:
    """Return a row for each target of each layer, with options and numerics."""
    return table(
        {
            "layer:n": "" if r.layer is None else f"{r.layer}",
            "target": r.target,
            **_outcome([r]),
            "method": r.method,
            "options:w": listed(r.options),
            "numerics:w": listed({name: f"{value:.3g}" for name, value in r.numerics.items()}),
        }
        for r in records
    )


def _outcome(records: Sequence[TargetRecord]) -> dict[str, str]:
    (predicted, measured), ends = _errors(records), size_ends(records)
    return {
        "predicted error:n": predicted,
        "measured error:n": measured,
        "kept:n": f"{sum(r.kept for r in records) / sum(r.whole for r in records):.1%}",
        "size:n:m": size_span(*ends) + size_unit(records[0].target, ends[1]),
    }


def _errors(records: Sequence[TargetRecord]) -> tuple[str, str]:
    """Return predicted and measured error of records of one metric; the latter is empty if nothing was measured."""
    metric, measured = records[0].predicted.metric, [r.measured for r in records]
    if unit := {"kl": "nats KL", "loss": "nats of loss"}.get(metric):
        predicted = f"{fmean(r.predicted.error for r in records):.2g} {unit}"
    else:
        predicted = f"{_relative([r.predicted for r in records]):.4f}"
    kl = [m.kl for m in measured if m.kl is not None]
    if len(kl) == len(measured):
        return predicted, f"{fmean(kl):.2g} nats KL"
    return predicted, f"{_relative(measured):.4f}" if all(m.error is not None for m in measured) else ""


def size_span(smallest: SizeValue, largest: SizeValue) -> str:
    """Return a size, or the smallest and the largest."""
    ends = [size_text(smallest), *([size_text(largest)] if largest != smallest else [])]
    return "-".join(ends)


def size_ends(records: Iterable[TargetRecord]) -> tuple[SizeValue, SizeValue]:
    """Return the sizes that keep the fewest and the most weights."""
    ordered = sorted(records, key=lambda record: record.kept)
    return ordered[0].size, ordered[-1].size


def size_unit(target: str, size: SizeValue) -> str:
    """Return what follows the size of a target: nothing where it is a rank, or more than one number."""
    units = {"mlp": " neurons", "qk": " per head", "ov": " per head"}
    return "" if isinstance(size, tuple) else units.get(target, "")


def listed(record: Mapping[str, Any]) -> str:
    """Return names and values in a line, without those that are None."""
    return ", ".join(f"{name} {value}" for name, value in record.items() if value is not None)


def _relative(errors: Iterable[Prediction | Measured]) -> float:
    return fmean(e.error / e.reference if e.error and e.reference else 0.0 for e in errors) ** 0.5


def check_tables(check: Check) -> Iterator[RenderableType]:
    """Yield sizes, bytes and memory of a plan for a model."""
    rows = [
        {
            "layers": row.layers,
            "target": row.target,
            "method": row.method,
            "size:n": size_text(row.size) + size_unit(row.target, row.size),
            "kept in each:n": f"{row.kept:,}",
            "of:n": f"{row.whole:,}",
            "keep:n": f"{row.kept / row.whole:.1%}",
        }
        for row in check.targets
    ]
    memory, least, tables = check.memory, check.least_memory, check.with_tables
    yield table(rows).on_screen()
    yield cost_table(check.before, check.after).on_screen()
    with_tables = f", {tables.keep:.2%} of {tables.weights}" if tables else ""
    yield f"kept: {check.keep:.2%} of the decoder's weights{with_tables}"
    yield (
        f"GPU memory for lrc compress: at most about {byte_text(memory.peak)}, an estimate ({memory.samples} blocks, "
        f"{memory.batch_size} at once, {memory.dtype}); "
        f"{byte_text(least.peak)} with --offload host or disk, where hidden states then take "
        f"{byte_text(memory.states)}{f' and gradients {byte_text(memory.gradients)}' if memory.gradients else ''}; "
        "perplexity is measured with both models whole where they fit, else a layer at a time"
    )
    yield from warning_lines(check.warnings)


def names_table(groups: Mapping[str, Iterable[Item]]) -> Iterator[RenderableType]:
    """Yield the names in every group, a row each."""
    names = {group: ", ".join(item.name for item in items) for group, items in groups.items()}
    yield table({"group": group, "names": each} for group, each in names.items()).on_screen()
    yield "lrc list GROUP shows one line and the source of each"


def catalogue_table(group: str, items: Iterable[Item]) -> RenderableType:
    """Return one group: a line for each item, and its source where any has one."""
    rows = [{group: item.name, "": item.summary, "source": item.source} for item in items]
    return table({name: cell for name, cell in row.items() if cell} for row in rows).on_screen()


def seconds_line(seconds: Mapping[str, float]) -> str:
    """Return seconds by stage in a line."""
    return "seconds: " + ", ".join(f"{stage} {each:.1f}" for stage, each in seconds.items())


def warning_lines(warnings: Iterable[str]) -> Iterator[str]:
    """Yield a line for each warning."""
    return (f"warning: {warning}" for warning in warnings)
