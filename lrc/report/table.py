"""Tables of results: on a terminal, in Markdown and, by ``lrc.report.page``, in HTML."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    from rich.table import Table as Screen
    from rich.text import Text

_Item = TypeVar("_Item")
_Key = TypeVar("_Key")
Cell: TypeAlias = "str | Text"  # with colours on a terminal alone


@dataclass(frozen=True)
class Column:
    """A heading and CSS classes: ``n`` numbers, flush right, ``w`` words that wrap; ``m``: not on a phone."""

    heading: str
    classes: str


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns."""

    columns: list[Column]
    rows: list[list[Cell]]
    caption: str = ""

    def on_screen(self) -> Screen:
        """Return the table for a terminal."""
        from rich.table import Table as Screen

        screen = Screen(title=self.caption or None, title_justify="left")
        for column in self.columns:
            justify = "right" if "n" in column.classes else "left"
            screen.add_column(column.heading, justify=justify, overflow="fold")
        for row in self.rows:
            screen.add_row(*row)
        return screen

    def in_markdown(self) -> list[str]:
        """Return the lines of the table in Markdown, with a blank line after them."""
        caption = [self.caption, ""] if self.caption else []
        rows = [[str(cell).replace("|", r"\|") for cell in row] for row in self.rows]
        lines = [[column.heading for column in self.columns], ["---"] * len(self.columns), *rows]
        return [*caption, *(f"| {' | '.join(line)} |" for line in lines), ""]


def table(rows: Iterable[Mapping[str, Cell]], caption: str = "") -> Table:
    """Make a table of rows that hold their cells by heading; a cell that a row lacks is empty.

    Headings that end in ``:n`` or ``:w`` are of that kind; those with ``:m`` after it are minor.
    """
    found, columns = list(rows), []
    headings = list(dict.fromkeys(heading for row in found for heading in row))
    for heading in headings:
        name, *classes = re.split(":(?=[nwm]$|[nw]:m$)", heading)
        columns.append(Column(name, " ".join(classes)))
    return Table(columns, [[row.get(heading, "") for heading in headings] for row in found], caption)


def grouped(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    """Return items by their key, in order."""
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
