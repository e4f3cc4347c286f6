"""What machines do to a run costs it nothing: ``scripts/faults.py --quick``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

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


def test_faults_cost_nothing() -> None:
    found = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True)
    rows = re.findall(r"^\| (.*?) \| (.*) \| (.*?) \|$", found.stdout, re.MULTILINE)[1:]
    assert rows, found.stderr
    assert (found.returncode == 0) == all(outcome == "as it should" for *_, outcome in rows)
    table: dict[str, list[str]] = {}
    for fault, what, outcome in rows:
        table.setdefault(fault, []).append(outcome if outcome == "as it should" else f"{what}: {outcome}")
    assert table == {fault: ["as it should"] * count for fault, count in ROWS.items()}
