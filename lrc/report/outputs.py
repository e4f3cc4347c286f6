"""Several outputs beside each other: what each takes and what it costs, by source model and by text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrc.checkpoint.sizes import Size
from lrc.errors import UserError
from lrc.evaluation.perplexity import Perplexity
from lrc.records.compression import REPORT, PerplexityChange, Report, read_report
from lrc.report.plots.cost import Point

_SAME = 1e-3  # relative, between perplexities of one dense model on one text on several machines


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
        """What its compression took, evaluation and all."""
        return sum(self.report.seconds.values())


@dataclass(frozen=True)
class OnText:
    """The outputs that were measured on the same windows in the same precision, by their place in the source's list.

    ``dense``: the perplexity of the original, as the first of them has it.
    """

    text: str
    dense: Perplexity
    changes: dict[int, PerplexityChange]

    @property
    def notes(self) -> list[str]:
        """What a reader has to know of the original's figure."""
        values = [change.before.value for change in self.changes.values()]
        if max(values) <= min(values) * (1 + _SAME):
            return []
        return [
            f"{self.text}: the original's perplexity is between {min(values):.5g} and {max(values):.5g} in these "
            f"reports; the point is that of the first, {self.dense.value:.5g}"
        ]


@dataclass(frozen=True)
class Source:
    """The outputs of one original, told from others by its fingerprint, in the order in which they were named."""

    model: str
    fingerprint: str
    before: Size
    outputs: list[Output]
    texts: list[OnText]

    @property
    def methods(self) -> list[str]:
        """The methods of its outputs, each once."""
        return list(dict.fromkeys(output.method for output in self.outputs))

    @property
    def notes(self) -> list[str]:
        """What the figures do not say by themselves."""
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
        """The same as JSON values, an output's perplexities by text."""
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
                        text.text: {
                            "before": text.changes[i].before.value,
                            "after": text.changes[i].after.value,
                            "ratio": text.changes[i].ratio,
                        }
                        for text in self.texts
                        if i in text.changes
                    },
                }
                for i, output in enumerate(self.outputs)
            ],
        }


def read_outputs(folders: Sequence[Path]) -> list[Source]:
    """Output folders by what they were made from; a folder that is named twice counts once.

    Raises UserError that names every folder without a report, and for a report that cannot be used.
    """
    by_source: dict[str, list[Output]] = {}
    advice = (
        "and only those can be compared (lrc eval MODEL --against MODEL holds other models beside each other)"
    )
    for output in _read(folders, advice):
        by_source.setdefault(output.report.fingerprint, []).append(output)
    return [as_source(found) for found in by_source.values()]


def read_beside(folders: Sequence[Path], model: str, fingerprint: str) -> list[Output]:
    """Outputs to stand beside one of a ``model``; UserError as above, and where one is of another."""
    outputs = _read(folders, "so name the folder of one, or leave it out", "--beside: ")
    others = [
        f"{each.folder} (of {each.report.model})"
        for each in outputs
        if each.report.fingerprint != fingerprint
    ]
    if others:
        raise UserError(
            f"--beside: not made from {model} as it is now, so not to be shown beside it: {', '.join(others)}"
        )
    return outputs


def as_source(outputs: list[Output]) -> Source:
    """Outputs of one original."""
    first = outputs[0].report
    return Source(first.model, first.fingerprint, first.before, outputs, list(_texts(outputs)))


def points(source: Source, text: OnText) -> list[Point]:
    """The original and what was measured of its outputs on a text, under names without what all begin with."""
    labels = short([output.label for output in source.outputs])
    return [
        Point("dense", source.before.bytes, text.dense.value, None),
        *(
            Point(labels[i], output.report.after.bytes, change.after.value, output.method)
            for i, change in text.changes.items()
            for output in [source.outputs[i]]
        ),
    ]


def short(labels: Sequence[str]) -> list[str]:
    """The same without the words that all begin with, words ending at a hyphen."""
    parted = [re.findall(r"[^-]*-|[^-]+$", label) for label in labels]
    alike = 0
    while (
        len(labels) > 1 and all(len(p) > alike + 1 for p in parted) and len({p[alike] for p in parted}) == 1
    ):
        alike += 1
    return ["".join(words[alike:]) for words in parted]


def _read(folders: Sequence[Path], advice: str, option: str = "") -> list[Output]:
    once = list({folder.resolve(): folder for folder in folders}.values())
    without = [str(folder) for folder in once if not (folder / REPORT).is_file()]
    if without:
        raise UserError(
            f"{option}no {REPORT} in {', '.join(without)}; lrc compress writes one into each of its outputs, {advice}"
        )
    reports = [read_report(folder) for folder in once]
    return [Output(*each) for each in zip(_labels(once), map(str, once), reports, strict=True)]


def _labels(folders: Sequence[Path]) -> list[str]:
    """Names of folders, those that are not their own with their parents'."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)
    ]


def _texts(outputs: Sequence[Output]) -> Iterable[OnText]:
    """What can stand on one axis: figures of the same tokens, windows, precision and protocol."""
    found: dict[tuple[Any, ...], dict[int, PerplexityChange]] = {}
    for i, output in enumerate(outputs):
        for change in output.report.perplexity:
            p = change.after
            key = p.data, p.ids_sha256, p.windows, p.seq_len, p.dtype, p.protocol
            found.setdefault(key, {}).setdefault(i, change)
    names = [key[0] for key in found]
    for (data, ids, count, length, dtype, protocol), changes in found.items():
        text = f"{data}, {count} × {length}, {dtype}"
        alike = [key for key in found if key[0] == data and key[2:5] == (count, length, dtype)]
        if len(alike) > 1:
            text += f", protocol {protocol}, ids {ids[:8]}"
        name = data if names.count(data) == 1 else text
        yield OnText(name, next(iter(changes.values())).before, changes)
