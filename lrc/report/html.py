"""``report.html``: a report as one self-contained page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lrc.checkpoint.sizes import byte_text
from lrc.records.compression import Report
from lrc.report.outputs import Output, Source, as_source, points
from lrc.report.page import Picture, Section, render
from lrc.report.plots.cost import cost
from lrc.report.plots.kept import Row, kept
from lrc.report.rows import (
    cost_table,
    error_note,
    every_table,
    facts,
    refits_table,
    size_ends,
    size_span,
    stages_table,
    targets_table,
)
from lrc.report.table import grouped


def html_page(report: Report, beside: Sequence[Output] = ()) -> str:
    """Return the report, with outputs of the same original ``beside`` it in the picture of the cost."""
    label = Path(report.out).name if beside else plan_name(report)
    source = as_source([Output(label, report.out, report), *beside])
    costs, targets, *rest = report_sections(report)
    costs = replace(costs, pictures=list(_costs(source)), notes=[*costs.notes, *source.notes])
    targets = replace(
        targets, pictures=list(_kept(report)), folded={"Every layer": every_table(report.targets)}
    )
    title = f"{Path(report.model).name}, {plan_name(report)}"
    return render(title, report.sentence, [costs, targets, *rest], _figures(report), report.warnings)


def report_sections(report: Report) -> list[Section]:
    """Return the sections of a report's page in words and tables: first its cost, then its targets, last its plan."""
    record, share = report.calibration, report.with_tables
    drawn = ", ".join(f"{source.blocks} of {source.data}" for source in record.sources)
    blocks = f"{record.samples} block{'s' * (record.samples != 1)}"
    rest = f", {share.keep:.1%} of {share.weights}" if share else ""
    notes = [
        f"Kept {report.keep:.1%} of the decoder's weights{rest}.",
        f"Calibrated on {blocks} of {record.seq_len} tokens: {drawn}.",
        *([f"Scale: {report.scale.text}."] if report.scale else []),
        *([] if report.perplexity else ["Perplexity was not measured; lrc eval does it."]),
        *(note for change in report.perplexity for note in change.after.notes),
    ]
    costs = cost_table(report.before, report.after, report.perplexity)
    targets = [targets_table(report.targets)]
    refitted = {f"{len(report.refits)} output projections fitted again": refits_table(report)}
    return [
        Section("What it cost", beside=[costs], notes=notes),
        Section("What was kept, and the errors", notes=[error_note(report.targets)], tables=targets),
        *([Section("Residual stream", folded=refitted)] if report.refits else []),
        Section("Time and memory", tables=[stages_table(report)]),
        Section("How it was made", facts=list(facts(report))),
        Section("Plan", text=report.plan_text.rstrip()),
    ]


def _figures(report: Report) -> Iterator[tuple[str, str, str]]:
    before, after = report.before, report.after
    for change in report.perplexity:
        both = f"{change.before.value:.4g} to {change.after.value:.4g}"
        yield f"perplexity, {change.before.data}", f"× {change.ratio:.3f}", both
    both = f"{byte_text(before.bytes)} to {byte_text(after.bytes)}"
    yield "bytes", f"× {after.bytes / before.bytes:.3f}", both
    cache = before.kv_bytes_per_token, after.kv_bytes_per_token
    yield "KV cache", f"× {cache[1] / cache[0]:.3f}", f"{cache[0]:,} to {cache[1]:,} bytes per token"
    yield "took", f"{sum(report.seconds.values()):,.0f} s", f"on {report.device}"


def _costs(source: Source) -> Iterator[Picture]:
    """Yield a picture of each text that this output, the first of the source, was measured on."""
    for i, text in enumerate(text for text in source.texts if 0 in text.changes):
        dense = text.dense
        caption = f"{dense.windows} windows of {dense.seq_len} tokens, {dense.dtype}, the same for all."
        if len(source.outputs) == 1:
            caption += " lrc compare puts other outputs beside it."
        yield Picture(cost(f"cost-{i}", text.text, points(source, text), source.methods), caption)


def _kept(report: Report) -> Iterator[Picture]:
    """Yield a picture with a row for each target; a layer in which the plan keeps the target is whole."""
    by_target = grouped(report.targets, lambda record: record.target)
    rows = []
    for target, records in by_target.items():
        at = {record.layer: record for record in records}
        here = [at.get(place) for place in ([None] if None in at else range(report.layers))]
        fractions = [1.0 if record is None else record.kept / record.whole for record in here]
        sizes = size_span(*size_ends(records))
        rows.append(Row(target, fractions, [record and record.method for record in here], sizes))
    if rows:
        caption = (
            "Weights kept of each target, by layer, as a part of the whole light bar; at the right the rank"
        )
        caption += ", for mlp the neurons." if "mlp" in by_target else "."
        if any(None in row.methods for row in rows):
            caption += " Grey: whole in that layer, or reduced there as part of another target."
        yield Picture(kept("kept", rows), caption)


def plan_name(report: Report) -> str:
    """Return the plan's name without its folder and ending."""
    return Path(report.plan).name.removesuffix(".yaml")
