"""Outputs beside each other: the table of an original's outputs, and the page of all."""

from __future__ import annotations

from collections.abc import Sequence

from lrc.checkpoint.sizes import Size, byte_text
from lrc.report.outputs import OnText, Source, points
from lrc.report.page import Picture, Section, render
from lrc.report.plots.cost import cost, front
from lrc.report.table import Table, table


def outputs_table(source: Source) -> Table:
    """Return a row for the original and one for each output."""
    heads = ["output:w"]
    for text in source.texts:
        heads += [f"{text.text}:n", "× dense:n"]
    heads += ["bytes:n", "of dense:n:m", "KV per token:n:m", "keep:n:m", "method:m", "seconds:n:m"]
    before = source.before

    def sizes(size: Size) -> list[str]:
        return [byte_text(size.bytes), f"{size.bytes / before.bytes:.3f}", f"{size.kv_bytes_per_token:,}"]

    dense = [cell for text in source.texts for cell in (f"{text.dense.value:.4g}", "1.000")]
    rows = [["dense", *dense, *sizes(before), "100%", "", ""]]
    for i, output in enumerate(source.outputs):
        quality = []
        for text in source.texts:
            change = text.changes.get(i)
            quality += ["", ""] if change is None else [f"{change.after.value:.4g}", f"{change.ratio:.3f}"]
        made = [f"{output.report.keep:.1%}", output.method, f"{output.seconds:.1f}"]
        rows.append([output.label, *quality, *sizes(output.report.after), *made])
    return table(heads, rows)


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
