"""A few cases of the fuzz of damaged checkpoints; the script runs 200."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_checkpoints.py"
ONCE_FAILED = ("98", "160", "170")


def test_some_cases_are_the_same_or_refused() -> None:
    command = [sys.executable, SCRIPT, "--only", "0", "7", *ONCE_FAILED]
    found = subprocess.run(command, capture_output=True, text=True)
    rows = [line for line in found.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(command) - 3, found.stderr
    assert "FAILED" not in found.stdout
    assert found.returncode == 0
