"""Compare outputs of one original in a table, and outputs of several originals on a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lrc.checkpoint.sizes import Size, byte_text
from lrc.report.outputs import OnText, Source, points
from lrc.report.page import Picture, Section, render
from lrc.report.plots.cost import cost, front
from lrc.report.table import Cell, Table, table


def outputs_table(source: Source) -> Table:
    """Return a row for the original and one for each output."""
    quality = {text.text: (text.dense.value, 1.0) for text in source.texts}
    rows = [_row(source, "dense", source.before, quality) | {"keep:n:m": "100%"}]
    for i, output in enumerate(source.outputs):
        changes = {text.text: text.changes[i] for text in source.texts if i in text.changes}
        quality = {text: (change.after.value, change.ratio) for text, change in changes.items()}
        made = {
            "keep:n:m": f"{output.report.keep:.1%}",
            "method:m": output.method,
            "seconds:n:m": f"{output.seconds:.1f}",
        }
        rows.append(_row(source, output.label, output.report.after, quality) | made)
    return table(rows)


def _row(
    source: Source, label: str, size: Size, quality: Mapping[str, tuple[float, float]]
) -> dict[str, Cell]:
    """Return the cells of a model of a ``size`` with perplexity and its ratio to the original's, by text."""
    row: dict[str, Cell] = {"output:w": label}
    for text, (value, ratio) in quality.items():
        of_text = f", {text}" if len(source.texts) > 1 else ""
        row |= {f"{text}:n": f"{value:.4g}", f"× dense{of_text}:n": f"{ratio:.3f}"}
    return row | {
        "bytes:n": byte_text(size.bytes),
        "of dense:n:m": f"{size.bytes / source.before.bytes:.3f}",
        "KV per token:n:m": f"{size.kv_bytes_per_token:,}",
    }


def compared_page(sources: Sequence[Source]) -> str:
    """Return the page of all sources, each with axes of its own."""
    models = ", ".join(source.model for source in sources)
    count = sum(len(source.outputs) for source in sources)
    sentence = f"{count} output{'s' * (count != 1)} of {models}: what each takes, and what it costs."
    if len(sources) > 1:
        sentence += f" They come from {len(sources)} originals, and are compared within each."
    sections = [
        Section(
            f"{source.model}, {byte_text(source.before.bytes)}",
            [_picture(f"cost-{number}-{i}", source, text) for i, text in enumerate(source.texts)],
            notes=source.notes,
            tables=[outputs_table(source)],
        )
        for number, source in enumerate(sources)
    ]
    return render(f"Outputs of {models}", sentence, sections)


def _picture(name: str, source: Source, text: OnText) -> Picture:
    found = points(source, text)
    edge = ", ".join(point.label for point in front(found))
    caption = (
        f"Down and left is better. No output is both smaller and better than those on the line: {edge}. "
        f"{text.dense.windows} windows of {text.dense.seq_len} tokens, {text.dense.dtype}."
    )
    return Picture(cost(name, text.text, found, source.methods), caption)
