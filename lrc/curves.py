"""Curves of what sizes cost as a file, with all that they hang on, so that another budget costs no measurement."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrc.allocate import Curve
from lrc.errors import UserError
from lrc.plan.resolved import ResolvedPlan

FORMAT = 2


@dataclass(frozen=True)
class Curves:
    """``curves`` found under ``key``, their costs in ``unit``.

    ``loss``: nats per held-out token of the model as it is, where costs were measured.
    """

    key: dict[str, Any]
    unit: str
    loss: float | None
    curves: list[Curve]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write the file in one step."""
        beside = path.with_name(f".{path.name}.tmp")
        beside.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)

    def differences(self, key: dict[str, Any]) -> list[str]:
        """Fields in which another key differs, each with both values."""
        names = [name for name in {**self.key, **key} if self.key.get(name) != key.get(name)]
        return [
            f"{name} (there {_short(self.key.get(name))}, here {_short(key.get(name))})" for name in names
        ]


def load_curves(path: Path) -> Curves:
    """Read what ``Curves.save`` wrote. Raises UserError where the file is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise UserError(f"{path} has format {found['format']!r}; this version of lrc reads {FORMAT}")
        return as_curves(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no curves of lrc plan ({type(error).__name__}: {error})") from error


def as_curves(values: dict[str, Any]) -> Curves:
    """What ``Curves.as_dict`` gave, from JSON."""
    curves = [Curve(**c | {k: tuple(c[k]) for k in ("sizes", "costs")}) for c in values["curves"]]
    return Curves(values["key"], values["unit"], values["loss"], curves)


def plan_sha256(plans: Sequence[ResolvedPlan]) -> str:
    """Hash of what is measured how: target, method and options in every layer, whatever the sizes."""
    found = {
        (layer.index, a.target, a.method, json.dumps(a.options, sort_keys=True))
        for plan in plans
        for layer in plan.layers
        for a in layer.assignments
    }
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()


def _short(value: object) -> str:
    return re.sub(r"([0-9a-f]{8})[0-9a-f]{56}", r"\1…", str(value))
