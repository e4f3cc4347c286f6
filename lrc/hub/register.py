"""Register compressed checkpoints with transformers, now or when transformers is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TARGET, LOADER = "transformers.quantizers.auto", "transformers.modeling_utils"


def install() -> None:
    """Register lrc's quantizer with transformers, without importing transformers."""
    module = sys.modules.get(TARGET)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # TARGET imports torch, which may call this: TARGET is half executed then, and models are loaded by LOADER.
        sys.meta_path.insert(0, _Finder(TARGET if module is None else LOADER))


class _Finder:
    """Import hook that registers lrc right after the module ``target`` is executed."""

    def __init__(self, target: str) -> None:
        self._target = target

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._target:
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
