"""A report as one self-contained page: what was done, what it cost, by layer, how long it took and how it was made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lrc.checkpoint.sizes import byte_text
from lrc.records.compression import Report, TargetRecord
from lrc.report.groups import size_ends, size_span, summarise
from lrc.report.markdown import error_note, refit_cells
from lrc.report.outputs import Output, Source, as_source, points
from lrc.report.page import Picture, Table, columns, render
from lrc.report.plots.cost import cost
from lrc.report.plots.errors import drawable, errors
from lrc.report.plots.kept import Row, kept
from lrc.report.plots.stages import stages

_UNITS = {"relative": "relative to the output", "kl": "nats KL"}


def html_page(report: Report, beside: Sequence[Output] = ()) -> str:
    """The whole report, with outputs of the same original ``beside`` it in the picture of the cost."""
    label = Path(report.out).name if beside else Path(report.plan).stem
    source = as_source([Output(label, report.out, report), *beside])
    comparable, left = _errors(report)
    return render(
        "report.html",
        report=report,
        title=f"{Path(report.model).name}, {Path(report.plan).stem}",
        sentence=report.sentence,
        figures=list(_figures(report)),
        costs=list(_costs(report, source)),
        cost_notes=list(_cost_notes(report, source)),
        sizes=_sizes(report),
        parts=[*_kept(report), *comparable],
        part_notes=left,
        targets=_targets(report),
        error_note=error_note(report.targets),
        every=_every(report),
        refits=_refits(report),
        run=[_stages(report)],
        stages=_stage_table(report),
        facts=list(_facts(report)),
    )


def _figures(report: Report) -> Iterator[tuple[str, str, str]]:
    before, after = report.before, report.after
    for change in report.perplexity:
        both = f"{change.before.value:.4g} to {change.after.value:.4g}"
        yield f"perplexity, {change.before.data}", f"× {change.ratio:.3f}", both
    yield (
        "bytes",
        f"× {after.bytes / before.bytes:.3f}",
        f"{byte_text(before.bytes)} to {byte_text(after.bytes)}",
    )
    cache = before.kv_bytes_per_token, after.kv_bytes_per_token
    yield "KV cache", f"× {cache[1] / cache[0]:.3f}", f"{cache[0]:,} to {cache[1]:,} bytes per token"
    yield "took", f"{sum(report.seconds.values()):,.0f} s", f"on {report.device}"


def _costs(report: Report, source: Source) -> Iterator[Picture]:
    """A picture of each text that this output, the first of the source's, was measured on."""
    kinds = list(dict.fromkeys(output.method for output in source.outputs))
    for i, text in enumerate(text for text in source.texts if 0 in text.changes):
        dense = text.dense
        caption = f"{dense.windows} windows of {dense.seq_len} tokens, {dense.dtype}, the same for all."
        if len(source.outputs) == 1:
            caption += " lrc compare puts other outputs beside it."
        yield Picture(Markup(cost(f"cost-{i}", text.text, points(source, text), kinds)), caption)


def _cost_notes(report: Report, source: Source) -> Iterator[str]:
    if not report.perplexity:
        yield "Perplexity was not measured; lrc eval does it."
        return
    yield from source.notes
    for change in report.perplexity:
        yield from change.after.notes


def _sizes(report: Report) -> Table:
    before, after = report.before, report.after
    rows = [
        [name, shown(old), shown(new), f"{new / old:.3f}"]
        for name, shown, old, new in (
            ("parameters", "{:,}".format, before.parameters, after.parameters),
            ("bytes", byte_text, before.bytes, after.bytes),
            ("KV cache, bytes per token", "{:,}".format, before.kv_bytes_per_token, after.kv_bytes_per_token),
        )
    ]
    for change in report.perplexity:
        before, after = change.before, change.after
        label = f"perplexity, {before.data} ({before.windows} × {before.seq_len} tokens, {before.dtype})"
        rows.append([label, f"{before.value:.4g}", f"{after.value:.4g}", f"{change.ratio:.3f}"])
        if before.bits_per_byte is not None and after.bits_per_byte is not None:
            ratio = after.bits_per_byte / before.bits_per_byte if before.bits_per_byte else math.nan
            cells = [f"{before.bits_per_byte:.4f}", f"{after.bits_per_byte:.4f}", f"{ratio:.3f}"]
            rows.append([f"bits per byte, {before.data}", *cells])
    tables = report.with_tables
    caption = f"Kept {report.keep:.1%} of the decoder's weights"
    caption += f", {tables.keep:.1%} of {tables.weights}." if tables else "."
    return Table(columns(":w", "before:n", "after:n", "ratio:n"), rows, caption)


def _kept(report: Report) -> Iterator[Picture]:
    """A row a target over all layers; those that the plan leaves a layer's alone are whole there."""
    by_target: dict[str, list[TargetRecord]] = {}
    for record in report.targets:
        by_target.setdefault(record.target, []).append(record)
    rows = []
    for target, records in by_target.items():
        size = size_span(*size_ends(records), "–")
        at = {record.layer: record for record in records}
        places = [None] if None in at else range(report.layers)
        here = [at.get(place) for place in places]
        fractions = [1.0 if record is None else record.kept / record.whole for record in here]
        rows.append(Row(target, fractions, [record and record.method for record in here], size))
    if rows:
        caption = (
            "Weights kept of each target, by layer, as a part of the whole light bar; at the right the rank"
        )
        caption += ", for mlp the neurons." if "mlp" in by_target else "."
        if any(None in row.methods for row in rows):
            caption += " Grey: whole in that layer, or reduced there as part of another target."
        yield Picture(Markup(kept("kept", rows)), caption)


def _errors(report: Report) -> tuple[list[Picture], list[str]]:
    """A picture for each unit in which something was both predicted and measured, and what has a place in none."""
    units: dict[str, dict[str, list[tuple[float, float]]]] = {}
    apart = list[str]()
    for record in report.targets:
        predicted, measured = record.predicted, record.measured
        if predicted.metric == "kl" and measured.kl is not None:
            unit, pair = "kl", (predicted.error, measured.kl)
        elif predicted.metric == "output" and measured.error is not None and measured.reference:
            unit, pair = "relative", (predicted.relative, (measured.error / measured.reference) ** 0.5)
        else:
            apart.append(f"{record.target} ({predicted.metric})")
            continue
        units.setdefault(unit, {}).setdefault(record.target, []).append(pair)
    pictures = [
        Picture(
            Markup(errors(f"errors-{unit}", _UNITS[unit], points)),
            "A point a layer, on the line where the measurement is as predicted; above it the error is larger.",
        )
        for unit, points in sorted(units.items(), reverse=True)
    ]
    notes = []
    if apart:
        names = ", ".join(dict.fromkeys(apart))
        notes.append(f"Predicted and measured in units of their own, so in no picture: {names}.")
    lost = sum(not drawable(p) for points in units.values() for pairs in points.values() for p in pairs)
    if lost:
        notes.append(f"Zero or not finite, and so without a place in the pictures: {lost} of the errors.")
    return pictures, notes


def _targets(report: Report) -> Table:
    rows = [
        [
            g.target,
            g.predicted_text,
            g.measured_text,
            f"{g.kept / g.whole:.1%}",
            g.size_text,
            g.method,
            f"{g.layers}",
        ]
        for g in summarise(report.targets)
    ]
    heads = (
        "target",
        "predicted error:n",
        "measured error:n",
        "kept:n",
        "size:n:m",
        "method",
        "layers:n:m",
    )
    return Table(columns(*heads), rows)


def _every(report: Report) -> Table:
    rows = []
    for record in report.targets:
        (group,) = summarise([record])
        layer = "" if record.layer is None else f"{record.layer}"
        options = ", ".join(f"{name} {value}" for name, value in record.options.items())
        numerics = ", ".join(f"{name} {value:.3g}" for name, value in record.numerics.items())
        kept_part = f"{record.kept / record.whole:.1%}"
        errors_of = [group.predicted_text, group.measured_text]
        how = [group.size_text, record.method, options, numerics]
        rows.append([layer, record.target, *errors_of, kept_part, *how])
    heads = (
        "layer:n",
        "target",
        "predicted:n",
        "measured:n",
        "kept:n",
        "size:n:m",
        "method",
        "options:w",
        "numerics:w",
    )
    return Table(columns(*heads), rows)


def _refits(report: Report) -> Table | None:
    if not report.refits:
        return None
    heads = ("layer:n", "behind", "ridge:n", "before:n", "after:n", "left out, before:n", "left out, after:n")
    caption = "Squared error of the compressed residual stream over the original's square."
    return Table(columns(*heads), [refit_cells(refit) for refit in report.refits], caption)


def _stages(report: Report) -> Picture:
    peaks = ", ".join(f"{place} {byte_text(size)}" for place, size in report.peak_bytes.items())
    return Picture(
        Markup(stages("stages", report.stages, report.device_bytes)),
        f"{sum(report.seconds.values()):,.1f} seconds in all. Peak memory of the run: {peaks}.",
    )


def _stage_table(report: Report) -> Table:
    whole = sum(report.seconds.values()) or 1.0
    rows = [
        [name, f"{seconds:.2f}", f"{seconds / whole:.1%}"]
        + ([byte_text(report.device_bytes.get(name, 0))] if report.device_bytes else [])
        for name, seconds in report.stages.items()
    ]
    heads = ["stage", "seconds:n", "of all:n", *(["device memory:n"] if report.device_bytes else [])]
    return Table(columns(*heads), rows)


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    record = report.calibration
    yield "Model", report.model
    if report.revision:
        yield "Revision", report.revision
    yield "Fingerprint", report.fingerprint
    yield "Written to", report.out
    yield "Plan", report.plan
    if report.allocation:
        yield "Sizes found by", _listed(report.allocation)
    yield "Calibration", _listed({k: v for k, v in asdict(record).items() if k != "sources"})
    for source in record.sources:
        yield "Calibration text", _listed(asdict(source))
    for change in report.perplexity:
        told = change.before
        yield "Perplexity text", f"{told.data}, protocol {told.protocol}, ids_sha256 {told.ids_sha256}"
    processes = f", {report.processes} processes" if report.processes > 1 else ""
    yield "Run", f"{report.device}, layers in {report.dtype}, {report.batch_size} blocks at once{processes}"
    yield "Hidden states", f"waiting on {report.states}"
    yield "Versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())


def _listed(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in record.items() if value is not None)
