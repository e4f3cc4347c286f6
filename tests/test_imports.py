"""Imports point one way, families' names stay in one place, and `import lrc` is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lrc
from lrc.families import families

PACKAGE = Path(lrc.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up; a module imports from the folders before its own, and from its own.
LAYERS = (
    "errors",
    "discovery",
    "run",
    "maths",
    "families",
    "text",
    "modules",
    "moments",
    "checkpoint",
    "methods",
    "hub",
    "plan",
    "walk",
    "compression",
    "estimate",
    "calibration",
    "evaluation",
    "allocation",
    "benchmark",
    "records",
    "inspection",
    "report",
    "verbs",
    "__init__",
    "cli",
    "__main__",
)
LEVELS = {name: level for level, name in enumerate(LAYERS)}
FAMILY_ROOMS = ("lrc.families", "lrc.hub.names")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def unit(module: str) -> str:
    """The name under which a module stands in LAYERS: its folder, or its file in the root; empty where in none."""
    inside = module.split(".")[1:]
    name = inside[0] if inside else "__init__"
    return name if name in LEVELS else ""


def imported(path: Path) -> Iterator[str]:
    """Modules of lrc that a file imports, wherever in the file the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("lrc."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "lrc":
                yield from (f"lrc.{alias.name}" for alias in node.names)
            elif node.module and node.module.startswith("lrc."):
                yield node.module


def upward(importer: str, target: str) -> bool:
    """Whether an import is against the layers; inside one package it never is."""
    if unit(importer) == unit(target):
        return False
    return LEVELS[unit(target)] >= LEVELS[unit(importer)]


def words(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every identifier and string of a file, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias):
            yield node.lineno, node.name


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    importer = module_name(path)
    assert unit(importer), f"{importer} stands in no layer: give it a place in LAYERS"
    against = [target for target in imported(path) if upward(importer, target)]
    assert not against, f"{importer} imports upward or sideways: {against}"


def test_the_layers_refuse_what_they_should() -> None:
    assert upward("lrc.methods.svd", "lrc.plan.schema")
    assert upward("lrc.maths.linalg", "lrc.moments.moment")
    assert not upward("lrc.plan.schema", "lrc.methods.sizes")
    assert not upward("lrc.methods.svd", "lrc.methods.sizes")


def test_every_layer_is_there_and_the_root_is_small() -> None:
    there = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert there == set(LAYERS)
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == [
        "__init__.py",
        "__main__.py",
        "discovery.py",
        "errors.py",
    ]


def test_nothing_in_the_root_bears_the_name_of_a_public_function() -> None:
    names = {path.stem for path in PACKAGE.iterdir()}
    assert not names & set(lrc.__all__) - {"__version__"}


def test_family_names_stay_in_their_room() -> None:
    stored = {stored.module for family in families().values() for stored in family.projections.values()}
    private = {part for module in stored for part in module.split(".") if part.startswith("c_")}
    # With a hyphen it names a checkpoint (tiny-gpt2, llama-7b), which a help text may give as an example.
    names = [*families(), *private, "Conv1D"]
    long, short = ("|".join(n for n in names if (len(n) > 4) == wide) for wide in (True, False))
    # Short names are parts of other words.
    pattern = re.compile(rf"(?<!-)({long}|\b({short})\b)(?!-)", re.IGNORECASE)
    elsewhere = [path for path in MODULES if not module_name(path).startswith(FAMILY_ROOMS)]
    found = [
        f"{path}:{line}: {text}" for path in elsewhere for line, text in words(path) if pattern.search(text)
    ]
    assert not found


def test_import_is_light() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'pydantic', 'matplotlib'}"
    script = f"import sys, lrc; print({heavy} & set(sys.modules) or 'light')"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "light"
