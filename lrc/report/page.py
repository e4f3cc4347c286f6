"""Pages of results: pictures and tables in one HTML file without scripts and links.

The template escapes all texts; pictures escape their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lrc.report.plots.theme import css
from lrc.report.table import Table

_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Picture:
    """An ``<svg>`` element and its caption."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A section: pictures with notes and tables ``beside`` them, then the rest in order.

    ``folded``: tables that the reader unfolds, by name.
    """

    heading: str
    pictures: list[Picture] = field(default_factory=list)
    beside: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: dict[str, Table] = field(default_factory=dict)
    facts: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""


def render(
    title: str,
    sentence: str,
    sections: Iterable[Section],
    figures: Iterable[tuple[str, str, str]] = (),
    warnings: Iterable[str] = (),
) -> str:
    """Return a page; each of ``figures``, shown large below the ``sentence``, is a name, a value and a detail."""
    return _PAGES.get_template("page.html").render(
        title=title,
        sentence=sentence,
        sections=list(sections),
        figures=list(figures),
        warnings=list(warnings),
        css=css(),
    )
