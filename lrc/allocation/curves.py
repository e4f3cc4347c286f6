"""Files of curves with the key that determines them, so that other budgets need no measurement."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lrc.allocation.spend import Curve
from lrc.calibration.draw import digest
from lrc.checkpoint.durable import write_file
from lrc.errors import UserError
from lrc.plan.document import dotted
from lrc.plan.resolved import ResolvedPlan

FORMAT = 5


@dataclass(frozen=True)
class Curves:
    """Curves of a model with costs in ``unit``; ``key`` holds everything that determines them.

    ``model``: the name that the user gave. ``loss``: the original model's nats per held-out token, if measured.
    """

    model: str
    key: dict[str, Any]
    unit: str
    loss: float | None
    curves: list[Curve]

    def as_dict(self) -> dict[str, Any]:
        """Return the curves as JSON values."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        write_file(path, json.dumps(self.as_dict(), indent=1) + "\n")

    def differences(self, model: str, key: Mapping[str, Any]) -> list[str]:
        """Return the fields in which another model's ``key`` differs, each with both values."""
        there, here = (
            {**k, "model": f"{m} {k.get('model')}"} for m, k in ((self.model, self.key), (model, key))
        )
        names = [name for name in {**self.key, **key} if self.key.get(name) != key.get(name)]
        return [f"{name} (there {_short(there.get(name))}, here {_short(here.get(name))})" for name in names]

    def fits(self, blank: Sequence[Curve]) -> bool:
        """Return whether these are the ``blank`` curves with a finite cost at every size."""
        bare, expected = ([replace(curve, costs=()) for curve in curves] for curves in (self.curves, blank))
        return bare == expected and all(
            len(curve.costs) == len(curve.sizes) and all(map(math.isfinite, curve.costs))
            for curve in self.curves
        )


_CURVES = TypeAdapter(Curves)


def file_name(model: str, key: Mapping[str, Any]) -> str:
    """Return the file name of curves: model, allocation and a hash of the key."""
    return f"{model}.{key['allocation']}.{digest(key)}.curves.json"


def load_curves(path: Path) -> Curves:
    """Read a file of ``Curves.save``. Raises UserError for any other file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or "format" not in found:
            raise ValueError("no mapping with a format")
        if found["format"] != FORMAT:
            raise UserError(
                f"{path} has format {found['format']!r}, this version of lrc reads {FORMAT}; remove it, or name "
                "another with --curves"
            )
        return as_curves(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = f"{dotted(first['loc'])}: {first['msg']}"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise UserError(
        f"{path} holds no curves of lrc plan ({reason}); remove it, or name another with --curves"
    )


def as_curves(values: Mapping[str, Any]) -> Curves:
    """Return the curves of ``Curves.as_dict``. Raises pydantic's ValidationError for other values."""
    return _CURVES.validate_json(json.dumps(values), strict=True)


def plan_sha256(plans: Sequence[ResolvedPlan]) -> str:
    """Return a hash of the targets, methods and options in and outside the layers, ignoring sizes."""
    found = {
        (-1 if index is None else index, a.target, a.method, json.dumps(a.options, sort_keys=True))
        for plan in plans
        for index in (None, *range(len(plan.layers)))
        for a in plan.unsized(index)
    }
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()


def _short(value: object) -> str:
    return re.sub(r"([0-9a-f]{8})[0-9a-f]{56}", r"\1…", str(value))
