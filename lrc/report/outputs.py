"""Outputs grouped by their original and by text: as a table, as a page, and as points of a report's picture."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrc.checkpoint.sizes import Size, byte_text
from lrc.errors import UserError
from lrc.evaluation.perplexity import Perplexity
from lrc.records.compression import REPORT, PerplexityChange, Report, read_report
from lrc.records.number import number, ratio_text
from lrc.report.page import Picture, Section, render
from lrc.report.plots.cost import Point, cost, front
from lrc.report.table import Cell, Table, grouped, table
from lrc.report.tables import ratio_cell, warning_lines

if TYPE_CHECKING:
    from rich.console import RenderableType

_SAME = 1e-3  # relative difference between perplexities of a model on several machines


@dataclass(frozen=True)
class Output:
    """A folder and its report; ``label`` names it in tables and pictures."""

    label: str
    folder: str
    report: Report

    @property
    def method(self) -> str:
        """The methods of its targets."""
        return ", ".join(self.report.methods) or "none"

    @property
    def seconds(self) -> float:
        """Seconds of its compression, evaluation included."""
        return sum(self.report.seconds.values())


@dataclass(frozen=True)
class TextResults:
    """Outputs measured on the same windows in the same precision, by their index in ``Original.outputs``.

    ``dense``: the original's perplexity in the first of their reports.
    """

    text: str
    dense: Perplexity
    changes: dict[int, PerplexityChange]

    @property
    def windows(self) -> str:
        """The windows and the precision of the figures."""
        return f"{self.dense.windows} windows of {self.dense.seq_len} tokens, {self.dense.dtype}"

    @property
    def notes(self) -> list[str]:
        """Caveats of the original's figure."""
        values = [change.before.value for change in self.changes.values()]
        if max(values) <= min(values) * (1 + _SAME):
            return []
        return [
            f"{self.text}: the original's perplexity is between {number(min(values), 5)} and "
            f"{number(max(values), 5)} in these reports; the point is that of the first, {number(self.dense.value, 5)}"
        ]


@dataclass(frozen=True)
class Original:
    """The outputs of one original, which its fingerprint identifies."""

    model: str
    fingerprint: str
    before: Size
    outputs: list[Output]
    texts: list[TextResults]
    domains: list[TextResults]

    @property
    def methods(self) -> list[str]:
        """The methods of its outputs, each once."""
        return list(dict.fromkeys(output.method for output in self.outputs))

    @property
    def notes(self) -> list[str]:
        """Caveats of the figures."""
        notes = [note for text in self.texts for note in text.notes]
        for text in self.texts:
            figures = {self.outputs[i].label: change.after.value for i, change in text.changes.items()}
            notes += [
                f"{text.text}: the perplexity of {label} is {value}, which has no place in the picture"
                for label, value in {"the original": text.dense.value, **figures}.items()
                if not math.isfinite(value)
            ]
        if unmeasured := [output.label for output in self.outputs if not output.report.perplexity]:
            notes.append(f"without a perplexity: {', '.join(unmeasured)}")
        return notes

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "before": asdict(self.before),
            "texts": [
                {"text": text.text, "dense": asdict(text.dense), "notes": text.notes} for text in self.texts
            ],
            "outputs": [
                {
                    "folder": output.folder,
                    "plan": output.report.plan,
                    "methods": output.report.methods,
                    "keep": output.report.keep,
                    "after": asdict(output.report.after),
                    "seconds": output.seconds,
                    "perplexity": {
                        name: {**found, "tokens": (tokens := change.tokens) and asdict(tokens)}
                        for name, change, found in _figures(self.texts, i)
                    },
                    "domains": {name: found for name, _, found in _figures(self.domains, i)},
                    "last_words": (words := output.report.last_words) and asdict(words),
                }
                for i, output in enumerate(self.outputs)
            ],
        }


def _figures(
    texts: Iterable[TextResults], output: int
) -> Iterator[tuple[str, PerplexityChange, dict[str, float]]]:
    """Yield the name of each text that an output was measured on, its change, and the change as JSON values."""
    for text in texts:
        if change := text.changes.get(output):
            figures = {"before": change.before.value, "after": change.after.value, "ratio": change.ratio}
            yield text.text, change, figures


def read_outputs(folders: Sequence[Path]) -> list[Original]:
    """Read output folders and group them by their original; a folder that is named twice counts once.

    Raises UserError that names every folder without a report, and for a report that cannot be used.
    """
    advice = "and only those can be compared (lrc eval MODEL --against MODEL compares other models)"
    groups = grouped(_read(folders, advice), lambda output: output.report.fingerprint)
    return [as_original(found) for found in groups.values()]


def read_beside(folders: Sequence[Path], model: str, fingerprint: str) -> list[Output]:
    """Read outputs of a ``model``. Raises UserError as ``read_outputs`` does, and for outputs of another model."""
    outputs = _read(folders, "so name the folder of one, or leave it out", "--beside: ")
    others = [each for each in outputs if each.report.fingerprint != fingerprint]
    if others:
        named = ", ".join(f"{each.folder} (of {each.report.model})" for each in others)
        raise UserError(
            f"--beside: not made from {model} as it is now, so not to be shown beside it: {named}"
        )
    return outputs


def as_original(outputs: list[Output]) -> Original:
    """Group outputs of one original by text."""
    first = outputs[0].report
    texts = [output.report.perplexity for output in outputs]
    domains = [[*output.report.domains.changes.values()] for output in outputs]
    return Original(
        first.model, first.fingerprint, first.before, outputs, list(_texts(texts)), list(_texts(domains))
    )


def points(original: Original, text: TextResults) -> list[Point]:
    """Return the original and its outputs on a text, under names without their common beginning."""
    labels, found = short([output.label for output in original.outputs]), []
    for i, change in text.changes.items():
        output = original.outputs[i]
        found.append(Point(labels[i], output.report.after.bytes, change.after.value, output.method))
    return [Point("dense", original.before.bytes, text.dense.value, None), *found]


def short(labels: Sequence[str]) -> list[str]:
    """Return labels without the words that all begin with; words end at a hyphen."""
    if len(labels) < 2:
        return list(labels)
    parted = [re.findall(r"[^-]*-|[^-]+$", label)[:-1] for label in labels]
    alike = takewhile(lambda words: len(set(words)) == 1, zip(*parted, strict=False))
    cut = len("".join(words[0] for words in alike))
    return [label[cut:] for label in labels]


def outputs_tables(originals: Iterable[Original]) -> Iterator[RenderableType]:
    """Yield a table of outputs for each original."""
    for original in originals:
        yield original.model
        yield outputs_table(original).on_screen()
        if (by_domain := domain_ratios(original)).rows:
            yield by_domain.on_screen()
        yield from (f"{text.text}: perplexity, {text.windows}" for text in original.texts)
        yield from warning_lines(original.notes)


def outputs_table(original: Original) -> Table:
    """Return a row for the original and one for each output."""

    def row(label: str, size: Size, quality: Mapping[str, tuple[float, str]], keep: str) -> dict[str, Cell]:
        """Return the cells of a model, given its perplexity and the ratio to the original's, by text."""
        cells: dict[str, Cell] = {"output:w": label}
        for text, (value, ratio) in quality.items():
            of_text = f", {text}" if len(original.texts) > 1 else ""
            cells |= {f"{text}:n": number(value), f"× dense{of_text}:n": ratio}
        return cells | {
            "bytes:n": byte_text(size.bytes),
            "of dense:n:m": f"{size.bytes / original.before.bytes:.3f}",
            "KV per token:n:m": f"{size.kv_bytes_per_token:,}",
            "keep:n:m": keep,
        }

    rows = [
        row(
            "dense",
            original.before,
            {text.text: (text.dense.value, "1.000") for text in original.texts},
            "100%",
        )
    ]
    for i, output in enumerate(original.outputs):
        changes = {text.text: text.changes[i] for text in original.texts if i in text.changes}
        quality = {text: (change.after.value, ratio_cell(change)) for text, change in changes.items()}
        cells = row(output.label, output.report.after, quality, f"{output.report.keep:.1%}")
        rows.append(cells | {"method:m": output.method, "seconds:n:m": f"{output.seconds:.1f}"})
    return table(rows)


def domain_ratios(original: Original) -> Table:
    """Return the original's perplexity by domain, and for each output the ratios to it and the largest of them."""
    heads = {text.text: f"{text.text}:n:m" for text in original.domains}
    dense = {
        head: number(text.dense.value) for text, head in zip(original.domains, heads.values(), strict=True)
    }
    rows: list[dict[str, Cell]] = [{"output:w": "dense", "largest ratio:w": "", **dense}]
    for i, output in enumerate(original.outputs):
        ratios = {text.text: text.changes[i].ratio for text in original.domains if i in text.changes}
        if ratios:
            name, ratio = [*output.report.domains.ratios.items()][-1]
            cells = {heads[text]: f"× {ratio_text(of)}" for text, of in ratios.items()}
            largest = f"× {ratio_text(ratio)}, {name}"
            rows.append({"output:w": output.label, "largest ratio:w": largest, **cells})
    return table(rows if rows[1:] else [], "Perplexity by domain, on small texts of the package.")


def compared_page(originals: Sequence[Original]) -> str:
    """Return the page of all originals, each with axes of its own."""
    models = ", ".join(original.model for original in originals)
    count = sum(len(original.outputs) for original in originals)
    sentence = f"{count} output{'s' * (count != 1)} of {models}: what each takes, and what it costs."
    if len(originals) > 1:
        sentence += f" They come from {len(originals)} originals, and are compared within each."
    sections = [
        Section(
            f"{original.model}, {byte_text(original.before.bytes)}",
            [_picture(f"cost-{number}-{i}", original, text) for i, text in enumerate(original.texts)],
            notes=original.notes,
            tables=[outputs_table(original), *([ratios] if (ratios := domain_ratios(original)).rows else [])],
        )
        for number, original in enumerate(originals)
    ]
    return render(f"Outputs of {models}", sentence, sections)


def _picture(name: str, original: Original, text: TextResults) -> Picture:
    found = points(original, text)
    edge = ", ".join(point.label for point in front(found))
    caption = (
        "Down and left is better. No output is both smaller and better than those on the line: "
        f"{edge}. {text.windows}."
    )
    return Picture(cost(name, text.text, found, original.methods), caption)


def _read(folders: Sequence[Path], advice: str, option: str = "") -> list[Output]:
    once = {folder.resolve(): folder for folder in folders}
    without = [str(folder) for folder in once.values() if not (folder / REPORT).is_file()]
    if without:
        raise UserError(
            f"{option}no {REPORT} in {', '.join(without)}; lrc compress writes one into each of its outputs, {advice}"
        )
    names = [path.name for path in once]
    return [
        Output(str(folder) if names.count(path.name) > 1 else path.name, str(folder), read_report(folder))
        for path, folder in once.items()
    ]


def _texts(outputs: Iterable[Iterable[PerplexityChange]]) -> Iterable[TextResults]:
    """Group outputs' figures that are comparable: of the same tokens, windows, precision and protocol."""
    found: dict[tuple[str, str, int, str], dict[int, PerplexityChange]] = {}
    for i, changes in enumerate(outputs):
        for change in changes:
            p = change.after
            key = p.data, f"{p.windows} × {p.seq_len}, {p.dtype}", p.protocol, p.ids_sha256
            found.setdefault(key, {}).setdefault(i, change)
    for (data, windows, protocol, ids), changes in found.items():
        same_data = [key for key in found if key[0] == data]
        name = data if len(same_data) == 1 else f"{data}, {windows}"
        if len([key for key in same_data if key[1] == windows]) > 1:
            name += f", protocol {protocol}, ids {ids[:8]}"
        yield TextResults(name, next(iter(changes.values())).before, changes)
