"""What machines do to a run costs it nothing: ``scripts/faults.py --quick``, a row of its table a test."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "faults.py"
ROWS = {
    "killed": 3,
    "disk full": 3,
    "output damaged": 2,
    "source damaged": 3,
    "source changed": 3,
    "plan changed": 1,
    "SIGINT": 1,
    "two runs at once": 1,
    "read-only output": 1,
    "strange path": 1,
}


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    """What came out of every fault."""
    found = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True)
    rows = re.findall(r"^\| (.*?) \| (.*) \| (.*?) \|$", found.stdout, re.MULTILINE)[1:]
    assert rows, found.stderr
    assert (found.returncode == 0) == all(outcome == "as it should" for *_, outcome in rows)
    table: dict[str, list[str]] = {}
    for fault, what, outcome in rows:
        table.setdefault(fault, []).append(outcome if outcome == "as it should" else f"{what}: {outcome}")
    return table


@pytest.mark.parametrize("fault", ROWS)
def test_a_fault_costs_nothing(table: dict[str, list[str]], fault: str) -> None:
    assert table[fault] == ["as it should"] * ROWS[fault]


def test_every_fault_is_known_here(table: dict[str, list[str]]) -> None:
    assert set(table) == set(ROWS)
