"""List what a user can choose from, one line each: what ``lrc list`` calls."""

from __future__ import annotations

import re
import sys
from itertools import takewhile
from pathlib import Path
from types import ModuleType

import lrc.families
from lrc.allocation import ALLOCATORS
from lrc.discovery import submodules
from lrc.errors import UserError, nearest
from lrc.hub.names import BUILTIN, SHORT_NAMES
from lrc.methods import Method, methods
from lrc.modules import kinds
from lrc.plan.library import shipped_plans
from lrc.records.check import Item
from lrc.text.datasets import DATASETS, GENERAL, GENERAL_WEIGHTS, SYNTHETIC

_PAPER = re.compile(r"\s*\(?(arXiv:\d{4}\.\d{4,5})\)?")


def catalogue(group: str | None = None) -> dict[str, list[Item]]:
    """Return the items of every group, or of one. Raises UserError for an unknown group."""
    families = [module for _, module in submodules(lrc.families) if hasattr(module, "FAMILY")]
    groups = {
        "methods": [_method(name, method) for name, method in methods().items()],
        "allocations": [Item(name, allocator.summary) for name, allocator in ALLOCATORS.items()],
        "families": [_documented(module.FAMILY.model_type, module) for module in families],
        "kinds": [_documented(name, sys.modules[kind.__module__]) for name, kind in kinds().items()],
        "plans": [Item(name, _plan_summary(path)) for name, path in shipped_plans().items()],
        "data": [
            *(Item(name, data.summary, data.hub or "in the package") for name, data in DATASETS.items()),
            Item(GENERAL, f"the default calibration, a mixture of {', '.join(GENERAL_WEIGHTS)}", "several"),
            Item(SYNTHETIC, "text that the model itself writes, for calibration alone", "the model"),
        ],
        "models": [
            *(Item(name, "built in; needs no network", "in the package") for name in BUILTIN),
            *(Item(name, "on the Hugging Face hub", repository) for name, repository in SHORT_NAMES.items()),
        ],
    }
    if group is None:
        return groups
    if group not in groups:
        raise UserError(f"there is no list of {group!r}; {nearest(group, groups)}")
    return {group: groups[group]}


def _method(name: str, method: Method) -> Item:
    papers = dict.fromkeys(solver.paper for solver in method.solvers.values())
    return Item(name, f"{method.summary} For: {', '.join(method.solvers)}.", "; ".join(papers))


def _documented(name: str, module: ModuleType) -> Item:
    """Return an item from the first line of its file; a paper named there is its source."""
    line = (module.__doc__ or "").strip().splitlines()[0]
    return Item(name, _PAPER.sub("", line), ", ".join(_PAPER.findall(line)))


def _plan_summary(path: Path) -> str:
    """Return the comment at the head of a plan, without its first line, the command."""
    comment = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return " ".join(filter(None, [line.removeprefix("#").strip() for line in comment][1:]))
