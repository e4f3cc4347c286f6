"""What a user can choose from: methods, allocations, families, kinds, plans, data and models, each with one line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
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
from lrc.records.catalogue import Item
from lrc.text.datasets import DATASETS, SYNTHETIC

_PAPER = re.compile(r"\s*\(?(arXiv:\d{4}\.\d{4,5})\)?")


def catalogue(group: str | None = None) -> dict[str, list[Item]]:
    """Every group, or the one named; UserError for an unknown one."""
    if group is not None and group not in _GROUPS:
        raise UserError(f"there is no list of {group!r}; {nearest(group, _GROUPS)}")
    return {name: list(items()) for name, items in _GROUPS.items() if group in (None, name)}


def _methods() -> Iterator[Item]:
    for name, method in methods().items():
        papers = dict.fromkeys(solver.paper for solver in method.solvers.values())
        yield Item(name, f"{method.summary} For: {', '.join(method.solvers)}.", "; ".join(papers))


def _allocations() -> Iterator[Item]:
    for name, allocator in ALLOCATORS.items():
        yield Item(name, allocator.summary)


def _families() -> Iterator[Item]:
    for _, module in submodules(lrc.families):
        if hasattr(module, "FAMILY"):
            yield _documented(module.FAMILY.model_type, module)


def _kinds() -> Iterator[Item]:
    for name, kind in kinds().items():
        yield _documented(name, sys.modules[kind.__module__])


def _plans() -> Iterator[Item]:
    for name, path in shipped_plans().items():
        yield Item(name, _plan_summary(path))


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
    """An item by the first line of its file; the paper named there is its source."""
    line = (module.__doc__ or "").strip().splitlines()[0]
    papers = _PAPER.findall(line)
    return Item(name, _PAPER.sub("", line), ", ".join(papers))


def _plan_summary(path: Path) -> str:
    """The comment at the head of a plan, below the command that runs it."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(line for line in lines[1:] if line)


_GROUPS: dict[str, Callable[[], Iterator[Item]]] = {
    "methods": _methods,
    "allocations": _allocations,
    "families": _families,
    "kinds": _kinds,
    "plans": _plans,
    "data": _data,
    "models": _models,
}
