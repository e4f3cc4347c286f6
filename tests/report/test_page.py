"""One table as three renderers show it."""

from __future__ import annotations

import io

from rich.console import Console

from lrc.report.page import Section, render
from lrc.report.table import table

FOUND = table(
    [
        {"target": "q|k", "c4:test:n": "1.5", "why:w": "<b>", "size:n:m": "3"},
        {"target": "o", "method:m": "svd"},
    ],
    "Caption",
)


def test_columns_by_their_headings() -> None:
    assert [column.heading for column in FOUND.columns] == ["target", "c4:test", "why", "size", "method"]
    assert [column.classes for column in FOUND.columns] == ["", "n", "w", "n m", "m"]


def test_markdown_keeps_its_columns() -> None:
    assert FOUND.in_markdown() == [
        "Caption",
        "",
        "| target | c4:test | why | size | method |",
        "| --- | --- | --- | --- | --- |",
        r"| q\|k | 1.5 | <b> | 3 |  |",
        "| o |  |  |  | svd |",
        "",
    ]


def test_a_terminal_shows_every_cell() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(FOUND.on_screen())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(cell in shown for cell in ("Caption", "q|k", "1.5", "<b>", "svd"))


def test_a_page_escapes_what_it_is_given() -> None:
    page = render(
        "<t>", "a & b", [Section("H", tables=[FOUND], facts=[("<n>", "<v>")], text="<p>")], warnings=["<w>"]
    )
    for escaped in (
        "&lt;b&gt;",
        "&lt;t&gt;",
        "a &amp; b",
        "&lt;n&gt;",
        "&lt;v&gt;",
        "&lt;p&gt;",
        "&lt;w&gt;",
    ):
        assert escaped in page
    assert '<td class="n m">3</td>' in page
