"""Find methods, kinds, families and the like by scanning their folders: adding one means adding a file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType


def submodules(package: ModuleType) -> Iterator[tuple[str, ModuleType]]:
    """Import every module of a package in name order; an import error stops the program."""
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        yield info.name, importlib.import_module(f"{package.__name__}.{info.name}")
