"""List what a user can choose from, one line each: what ``lrc list`` calls."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from types import ModuleType

import lrc.families
from lrc.allocation import ALLOCATORS
from lrc.discovery import submodules
from lrc.errors import UserError, nearest
from lrc.hub.names import ASSETS, BUILTIN, SHORT_NAMES
from lrc.methods import methods
from lrc.modules import kinds
from lrc.plan.library import shipped_plans
from lrc.records.check import Item
from lrc.text.datasets import DATASETS, SYNTHETIC

_PAPER = re.compile(r"\s*\(?(arXiv:\d{4}\.\d{4,5})\)?")


def catalogue(group: str | None = None) -> dict[str, list[Item]]:
    """Return the items of every group, or of one. Raises UserError for an unknown group."""
    groups: dict[str, Callable[[], Iterator[Item]]] = {
        "methods": _methods,
        "allocations": lambda: (Item(name, allocator.summary) for name, allocator in ALLOCATORS.items()),
        "families": lambda: (
            _documented(module.FAMILY.model_type, module)
            for _, module in submodules(lrc.families)
            if hasattr(module, "FAMILY")
        ),
        "kinds": lambda: (_documented(name, sys.modules[kind.__module__]) for name, kind in kinds().items()),
        "plans": lambda: (Item(name, _plan_summary(path)) for name, path in shipped_plans().items()),
        "data": _data,
        "models": _models,
    }
    if group is not None and group not in groups:
        raise UserError(f"there is no list of {group!r}; {nearest(group, groups)}")
    return {name: list(items()) for name, items in groups.items() if group in (None, name)}


def _methods() -> Iterator[Item]:
    for name, method in methods().items():
        papers = dict.fromkeys(solver.paper for solver in method.solvers.values())
        yield Item(name, f"{method.summary} For: {', '.join(method.solvers)}.", "; ".join(papers))


def _data() -> Iterator[Item]:
    for name, data_set in DATASETS.items():
        yield Item(name, data_set.summary, data_set.hub or "in the package")
    yield Item(SYNTHETIC, "text that the model itself writes, for calibration alone", "the model")


def _models() -> Iterator[Item]:
    for name in BUILTIN:
        config = json.loads((ASSETS / name / "config.json").read_text(encoding="utf-8"))
        yield Item(name, f"built in, {config['model_type']}; needs no network", "in the package")
    for name, repository in SHORT_NAMES.items():
        yield Item(name, "on the Hugging Face hub", repository)


def _documented(name: str, module: ModuleType) -> Item:
    """Return an item from the first line of its file; a paper named there is its source."""
    line = (module.__doc__ or "").strip().splitlines()[0]
    return Item(name, _PAPER.sub("", line), ", ".join(_PAPER.findall(line)))


def _plan_summary(path: Path) -> str:
    """Return the comment at the head of a plan, without its first line, the command."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = takewhile(lambda line: line.startswith("#"), lines)
    words = [line.removeprefix("#").strip() for line in comment]
    return " ".join(filter(None, words[1:]))
