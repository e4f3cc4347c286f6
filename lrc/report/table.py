"""Tables of results: on a terminal, in Markdown and, by ``lrc.report.page``, in HTML."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text

_Item = TypeVar("_Item")
_Key = TypeVar("_Key")
_WORD = 24  # of a word that is longer, such as a path, a column may hold parts
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

    def on_screen(self) -> RenderableType:
        """Return the table for a terminal."""
        return _Screen(self)

    def in_markdown(self) -> list[str]:
        """Return the lines of the table in Markdown, with a blank line after them."""
        caption = [self.caption, ""] if self.caption else []
        rows = [[str(cell).replace("|", r"\|") for cell in row] for row in self.rows]
        lines = [[column.heading for column in self.columns], ["---"] * len(self.columns), *rows]
        return [*caption, *(f"| {' | '.join(line)} |" for line in lines), ""]


@dataclass(frozen=True)
class _Screen:
    """A table on a terminal; where the columns are too narrow for their words, lines of names and values instead."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.table import Table as Screen
        from rich.text import Text

        columns, rows = self.table.columns, self.table.rows
        if (widths := self._widths(options.max_width)) is None:
            yield from [self.table.caption] if self.table.caption else []
            for row in rows:
                cells = zip(columns, row, strict=True)
                yield from (Text.assemble(f"{column.heading}: ", cell) for column, cell in cells if cell)
                yield ""
            return
        screen = Screen(title=self.table.caption or None, title_justify="left")
        for column, width in zip(columns, widths, strict=True):
            justify = "right" if "n" in column.classes else "left"
            screen.add_column(column.heading, justify=justify, overflow="fold", width=width)
        for row in rows:
            screen.add_row(*row)
        yield screen

    def _widths(self, width: int) -> list[int] | None:
        """Return the widths of the columns, each for its longest word (a path may break); None if they do not fit."""
        least, most = [], []
        for column, *cells in zip(self.table.columns, *self.table.rows, strict=True):
            texts = [column.heading, *map(str, cells)]
            words = [len(word) for text in texts for word in text.split()]
            least.append(min(max(words, default=1), _WORD))
            most.append(max([1, *(len(line) for text in texts for line in text.splitlines())]))
        spare = width - 3 * len(least) - 1 - sum(least)
        if spare < 0:
            return None
        found = list(least)
        # A column that needs less than an equal share leaves the rest to the others.
        for left, at in zip(
            range(len(most), 0, -1), sorted(range(len(most)), key=lambda i: most[i] - least[i]), strict=True
        ):
            found[at] += min(most[at] - least[at], spare // left)
            spare -= found[at] - least[at]
        return found


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
