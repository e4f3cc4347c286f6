"""Outputs beside each other as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lrc.checkpoint.sizes import byte_text
from lrc.report.outputs import OnText, Source, points
from lrc.report.page import Picture, Table, columns, render
from lrc.report.plots.cost import cost, front


@dataclass(frozen=True)
class Group:
    """What the page shows of one source."""

    heading: str
    pictures: list[Picture]
    notes: list[str]
    table: Table


def compared_page(sources: Sequence[Source]) -> str:
    """The page of all sources, each with axes of its own."""
    models = ", ".join(source.model for source in sources)
    count = sum(len(source.outputs) for source in sources)
    sentence = (
        f"{count} {'output' if count == 1 else 'outputs'} of {models}: what each takes, and what it costs."
    )
    if len(sources) > 1:
        sentence += f" They come from {len(sources)} originals, and are compared within each."
    groups = [_group(i, source) for i, source in enumerate(sources)]
    return render("compare.html", title=f"Outputs of {models}", sentence=sentence, groups=groups)


def _group(number: int, source: Source) -> Group:
    pictures = [_picture(f"cost-{number}-{i}", source, text) for i, text in enumerate(source.texts)]
    return Group(f"{source.model}, {byte_text(source.before.bytes)}", pictures, source.notes, _table(source))


def _picture(name: str, source: Source, text: OnText) -> Picture:
    found = points(source, text)
    kinds = list(dict.fromkeys(output.method for output in source.outputs))
    edge = [point.label for point in front(found)]
    caption = (
        f"Down and left is better. No output is both smaller and better than those on the line: {', '.join(edge)}. "
        f"{text.dense.windows} windows of {text.dense.seq_len} tokens, {text.dense.dtype}."
    )
    return Picture(Markup(cost(name, text.text, found, kinds)), caption)


def _table(source: Source) -> Table:
    heads = ["output:w"]
    for text in source.texts:
        heads += [f"{text.text}:n", "× dense:n"]
    heads += ["bytes:n", "of dense:n:m", "KV per token:n:m", "keep:n:m", "method:m", "seconds:n:m"]
    return Table(columns(*heads), list(_rows(source)))


def _rows(source: Source) -> Iterator[list[str]]:
    before = source.before
    quality = [cell for text in source.texts for cell in (f"{text.dense.value:.4g}", "1.000")]
    size = [byte_text(before.bytes), "1.000", f"{before.kv_bytes_per_token:,}"]
    yield ["dense", *quality, *size, "100%", "", ""]
    for i, output in enumerate(source.outputs):
        after = output.report.after
        size = [byte_text(after.bytes), f"{after.bytes / before.bytes:.3f}", f"{after.kv_bytes_per_token:,}"]
        quality = []
        for text in source.texts:
            change = text.changes.get(i)
            quality += ["", ""] if change is None else [f"{change.after.value:.4g}", f"{change.ratio:.3f}"]
        yield [
            output.label,
            *quality,
            *size,
            f"{output.report.keep:.1%}",
            output.method,
            f"{output.seconds:.1f}",
        ]
