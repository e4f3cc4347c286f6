"""Register compressed checkpoints with transformers, now or when transformers is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TARGET = "transformers.quantizers.auto"


def install() -> None:
    """Register lrc's quantizer with transformers, without importing transformers."""
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Import hook that registers lrc right after ``TARGET`` is executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            _register()

        loader.exec_module = execute_and_register
        return spec


def _register() -> None:
    import lrc.hub.quantizer  # noqa: F401
