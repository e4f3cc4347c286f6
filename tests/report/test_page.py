"""Columns of tables by their headings."""

from __future__ import annotations

from lrc.report.page import Column, columns


def test_columns_by_their_headings() -> None:
    found = columns("target", "c4:test:n", "why:w", "size:n:m", "method:m")
    assert found == [
        Column("target"),
        Column("c4:test", "n"),
        Column("why", "w"),
        Column("size", "n", minor=True),
        Column("method", minor=True),
    ]
    assert [column.classes for column in found] == ["", "n", "w", "n m", "m"]
