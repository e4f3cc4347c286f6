"""Makes Hugging Face checkpoints smaller and faster by low-rank factorization, and says what that cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrc.hub.register import install

if TYPE_CHECKING:
    from lrc.ablation import ablate
    from lrc.api import compress, evaluate
    from lrc.evaluating import evaluate_against
    from lrc.hub.loader import load
    from lrc.planning import make_plan

__all__ = ["__version__", "ablate", "compress", "evaluate", "evaluate_against", "load", "make_plan"]
__version__ = "0.1.0"

_HOMES = {
    "ablate": "lrc.ablation",
    "compress": "lrc.api",
    "evaluate": "lrc.api",
    "evaluate_against": "lrc.evaluating",
    "load": "lrc.hub.loader",
    "make_plan": "lrc.planning",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


install()
