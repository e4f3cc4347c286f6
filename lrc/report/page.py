"""What the pages of reports are made of: tables, pictures and the templates that they stand in.

A page is one file that fetches nothing and runs nothing. Whatever a user named is escaped by the templates; the
pictures alone go in as they are, as they escape their text themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lrc.report.plots.theme import css


@dataclass(frozen=True)
class Column:
    """A heading; ``kind`` ``n`` holds numbers, flush right, ``w`` words that wrap; ``minor``: not on a phone."""

    heading: str
    kind: str = ""
    minor: bool = False

    @property
    def classes(self) -> str:
        """Those of its cells."""
        return f"{self.kind} {'m' * self.minor}".strip()


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns."""

    columns: list[Column]
    rows: list[list[str]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """An ``<svg>`` element and what it shows."""

    svg: Markup
    caption: str


def columns(*headings: str) -> list[Column]:
    """Columns by their headings, those that end in ``:n`` or ``:w`` of that kind, with ``:m`` after it minor."""
    found = []
    for heading in headings:
        name = heading.removesuffix(":m")
        kind = name[-1] if name.endswith((":n", ":w")) else ""
        found.append(Column(name[:-2] if kind else name, kind, minor=name != heading))
    return found


def render(template: str, **values: Any) -> str:
    """A page by the name of its template and what that asks for."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(css=Markup(css()), **values)
