"""Runs the contract tests of families and of loading against other releases of transformers.

    python scripts/transformers_gate.py            # the oldest and the newest of the range in pyproject.toml
    python scripts/transformers_gate.py 5.17.0

Each release is installed with its own dependencies into a temporary folder that comes before the environment's
packages; nothing of the environment changes. Exits with 1 if a test fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Annotated

import typer
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[1]
TESTS = ("tests/families", "tests/hub/test_loading.py", "tests/walk/test_stream.py")


def supported() -> SpecifierSet:
    """Return the range of transformers in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (found,) = (each for each in project["dependencies"] if re.match(r"transformers\b", each))
    return SpecifierSet(found.removeprefix("transformers"))


def ends_of_range() -> list[str]:
    """Return the oldest and the newest supported release that the package index has."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    versions = re.findall(r"\d[\w.]*", listed.split("Available versions:")[1].splitlines()[0])
    there = sorted(v for v in map(Version, versions) if v in supported())
    return [str(there[0]), str(there[-1])]


def passes(version: str) -> bool:
    """Run the tests with one release, show what they print, and tell whether all pass."""
    typer.echo(f"transformers {version}")
    with tempfile.TemporaryDirectory() as folder:
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--target",
            folder,
            f"transformers=={version}",
        ]
        subprocess.run(install, check=True)
        path = os.pathsep.join([folder, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        return subprocess.run(tests, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}).returncode == 0


def main(
    versions: Annotated[list[str] | None, typer.Argument(help="Releases (default: both ends).")] = None,
) -> None:
    failed = [version for version in versions or ends_of_range() if not passes(version)]
    if failed:
        typer.echo(f"failed with transformers {', '.join(failed)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
