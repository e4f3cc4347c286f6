"""JSON is strict wherever lrc writes it: NaN and infinity are no values of JSON, so writing one is an error."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "lrc"


def writes(tree: ast.AST) -> list[ast.Call]:
    """The calls of ``json.dump`` and ``json.dumps``."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) in ("json.dump", "json.dumps")]


def test_every_write_refuses_nan() -> None:
    found = {path: writes(ast.parse(path.read_text(encoding="utf-8"))) for path in ROOT.rglob("*.py")}
    assert sum(map(len, found.values())) > 5
    lax = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path, calls in found.items()
        for call in calls
        if "allow_nan=False" not in [f"{k.arg}={ast.unparse(k.value)}" for k in call.keywords]
    ]
    assert lax == []
