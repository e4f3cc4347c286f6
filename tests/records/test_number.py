"""Numbers as every table and report writes them."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

import lrc
from lrc.records.number import number


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (47180.4, 4, "47,180"),
        (47180.4, 5, "47,180"),
        (1234.56, 4, "1,235"),
        (1234.56, 5, "1,234.6"),
        (9999.6, 4, "10,000"),
        (12.345, 4, "12.35"),
        (0.00212345, 4, "0.002123"),
        (1234567.0, 4, "1,234,567"),
        (3e15, 4, "3e+15"),
        (2.5e-7, 4, "2.5e-07"),
        (-47180.0, 4, "-47,180"),
        (0.0, 4, "0"),
        (math.inf, 4, "inf"),
        (math.nan, 4, "nan"),
    ],
)
def test_a_number_is_written_out(value: float, digits: int, text: str) -> None:
    assert number(value, digits) == text


def test_no_figure_is_formatted_elsewhere() -> None:
    places = [
        path
        for room in ("report", "records")
        for path in Path(lrc.__file__).parent.joinpath(room).rglob("*.py")
    ]
    found = [path.name for path in places if re.search(r":\.[45]g[}]", path.read_text(encoding="utf-8"))]
    assert set(found) <= {"number.py", "ablation.py"}  # the reciprocal of a kept fraction
