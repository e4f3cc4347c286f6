"""Tables on terminals of any width keep words whole; lines of names and values where columns cannot."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lrc.report.table import table

ROW = {
    "layers": "0-4",
    "target": "mlp",
    "method": "two_sided_svd",
    "size:n": "410 neurons",
    "kept in each:n": "236,160",
    "of:n": "294,912",
    "predicted error:n": "0.1234",
    "keep:n": "80.1%",
}


def shown(width: int, rows: list[dict[str, str]]) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(rows, "Sizes of layers").on_screen())
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", range(24, 132, 6))
def test_words_stay_whole(width: int) -> None:
    lines = shown(width, [ROW, ROW | {"method": "a3"}])
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    words = {word for name, cell in ROW.items() for word in f"{name.removesuffix(':n')} {cell}".split()}
    assert [word for word in words if word not in text] == []


def test_a_narrow_terminal_has_a_line_for_each_cell() -> None:
    lines = shown(40, [ROW, ROW | {"method": ""}])
    assert lines[:5] == [
        "Sizes of layers",
        "layers: 0-4",
        "target: mlp",
        "method: two_sided_svd",
        "size: 410 neurons",
    ]
    assert lines.count("target: mlp") == 2
    assert "method: " not in lines


def test_a_path_may_break_before_the_table_does() -> None:
    path = "/tmp/a/long/path/to/the/texts/of/a/user.txt"
    lines = shown(60, [{"text": path, "perplexity:n": "47,180", "dtype": "float32"}])
    assert lines[1].startswith("┏")
    assert all(word in "\n".join(lines) for word in ("perplexity", "47,180", "float32"))
