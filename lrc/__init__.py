"""Makes Hugging Face checkpoints smaller and faster by low-rank factorization, and says what that cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrc.hub.register import install

if TYPE_CHECKING:
    from lrc.ablation import ablate
    from lrc.benchmark.bench import bench
    from lrc.compressing import compress
    from lrc.evaluating import evaluate, evaluate_against
    from lrc.hub.loader import load
    from lrc.inspection.inspector import inspect_model
    from lrc.modules.fuse import fuse, unfuse
    from lrc.planning import make_plan
    from lrc.report.report import read_report

__all__ = [
    "__version__",
    "ablate",
    "bench",
    "compress",
    "evaluate",
    "evaluate_against",
    "fuse",
    "inspect_model",
    "load",
    "make_plan",
    "read_report",
    "unfuse",
]
__version__ = "0.1.0"

_HOMES = {
    "ablate": "lrc.ablation",
    "bench": "lrc.benchmark.bench",
    "compress": "lrc.compressing",
    "evaluate": "lrc.evaluating",
    "evaluate_against": "lrc.evaluating",
    "fuse": "lrc.modules.fuse",
    "inspect_model": "lrc.inspection.inspector",
    "load": "lrc.hub.loader",
    "make_plan": "lrc.planning",
    "read_report": "lrc.report.report",
    "unfuse": "lrc.modules.fuse",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


install()
