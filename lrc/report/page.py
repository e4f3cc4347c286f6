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

from lrc.plots.theme import css


@dataclass(frozen=True)
class Column:
    """A heading; ``kind`` ``n`` holds numbers, flush right, ``w`` words that wrap."""

    heading: str
    kind: str = ""


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
    """Columns by their headings, those that end in ``:n`` or ``:w`` of that kind."""
    kinds = [heading[-1] if heading.endswith((":n", ":w")) else "" for heading in headings]
    return [
        Column(heading[:-2] if kind else heading, kind) for heading, kind in zip(headings, kinds, strict=True)
    ]


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
