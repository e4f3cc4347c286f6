"""Make Hugging Face checkpoints smaller and faster by low-rank factorization, and report the cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lrc.hub.register import install

if TYPE_CHECKING:
    from lrc.allocation.sizing import Limits, Measuring
    from lrc.errors import UserError
    from lrc.hub.loader import load
    from lrc.modules.fused.fuse import fuse, unfuse
    from lrc.plan.schema import Plan
    from lrc.records.compression import read_report
    from lrc.run.settings import Run
    from lrc.run.versions import __version__
    from lrc.verbs.ablate import ablate
    from lrc.verbs.bench import bench
    from lrc.verbs.check import check
    from lrc.verbs.compress import compress
    from lrc.verbs.evaluate import evaluate, evaluate_against
    from lrc.verbs.inspect import inspect_model
    from lrc.verbs.plan import make_plan
    from lrc.verbs.verify import verify

__all__ = [
    "Limits",
    "Measuring",
    "Plan",
    "Run",
    "UserError",
    "__version__",
    "ablate",
    "bench",
    "check",
    "compress",
    "evaluate",
    "evaluate_against",
    "fuse",
    "inspect_model",
    "load",
    "make_plan",
    "read_report",
    "unfuse",
    "verify",
]
_HOMES = {
    "Limits": "lrc.allocation.sizing",
    "Measuring": "lrc.allocation.sizing",
    "Plan": "lrc.plan.schema",
    "Run": "lrc.run.settings",
    "UserError": "lrc.errors",
    "__version__": "lrc.run.versions",
    "ablate": "lrc.verbs.ablate",
    "bench": "lrc.verbs.bench",
    "check": "lrc.verbs.check",
    "compress": "lrc.verbs.compress",
    "evaluate": "lrc.verbs.evaluate",
    "evaluate_against": "lrc.verbs.evaluate",
    "fuse": "lrc.modules.fused.fuse",
    "inspect_model": "lrc.verbs.inspect",
    "load": "lrc.hub.loader",
    "make_plan": "lrc.verbs.plan",
    "read_report": "lrc.records.compression",
    "unfuse": "lrc.modules.fused.fuse",
    "verify": "lrc.verbs.verify",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


install()
