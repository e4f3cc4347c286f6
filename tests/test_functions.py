"""No function is longer than 80 lines, and none takes more than 12 parameters."""

from __future__ import annotations

import ast
from pathlib import Path

import lrc

LINES, PARAMETERS = 80, 12


def test_functions_are_short_and_take_few_parameters() -> None:
    found = []
    for path in sorted(Path(lrc.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            parameters = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
            if lines > LINES or parameters > PARAMETERS:
                found.append(
                    f"{path}:{node.lineno}: {node.name} has {lines} lines and {parameters} parameters"
                )
    assert not found
