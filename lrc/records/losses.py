"""Losses of a model with one target alone shrunk, as a file with all that they hang on: what an ablation keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lrc.checkpoint.durable import write_text, written
from lrc.errors import UserError
from lrc.evaluation.perplexity import Perplexity

_FORMAT = 1


@dataclass(frozen=True)
class Loss:
    """Nats per token with one target shrunk in all layers, and by what."""

    target: str
    method: str
    keep: float
    options: dict[str, Any]
    nats: float


@dataclass(frozen=True)
class Losses:
    """What was measured under a ``key``; ``dense``: of the model as it is."""

    key: dict[str, Any]
    dense: Perplexity | None = None
    losses: list[Loss] = field(default_factory=list)

    def of(self, asked: Mapping[str, Any]) -> float | None:
        """The loss of a target, method, fraction and options, if it is known."""
        return next((each.nats for each in self.losses if asked.items() <= asdict(each).items()), None)

    def save(self, path: Path) -> None:
        """Write the file. Raises OutOfResources where it cannot be written."""
        with written(path):
            write_text(path, json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n")


_LOSSES = TypeAdapter(Losses)


def load_losses(path: Path, key: Mapping[str, Any]) -> Losses | None:
    """What an earlier run kept; UserError where the file holds anything else, which nothing may overwrite."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.pop("format", None) == _FORMAT and found.get("key") == key:
            return _LOSSES.validate_json(json.dumps(found))
    except (OSError, ValueError, ValidationError):
        pass
    raise UserError(
        f"{path} holds no results of lrc eval --ablate for what its name says; remove it, or pass --fresh"
    )
