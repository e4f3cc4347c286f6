"""docs/architecture.md lists every file of lrc/, with one line each, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"^- `(lrc/[^`]+)` — \S.*$")


def test_the_tree_is_listed_file_by_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Every file\n")[1]
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    listed = [match[1] for line in lines if (match := LINE.match(line))]
    assert len(listed) == len(lines), "a line is not of the form: - `lrc/FILE.py` — what it holds"
    there = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "lrc").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert not there - set(listed), "docs/architecture.md lacks these files"
    assert not set(listed) - there, "docs/architecture.md lists files that are gone"
    assert len(listed) == len(set(listed)), "docs/architecture.md lists a file twice"
