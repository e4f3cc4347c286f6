"""The cost of shrinking one projection or component alone, and the file that caches the losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lrc.checkpoint.durable import write_file
from lrc.errors import UserError
from lrc.evaluation.perplexity import Perplexity
from lrc.records.compression import json_text

_FORMAT = 1


@dataclass(frozen=True)
class Ablated:
    """One target alone shrunk in all layers, to ``kept`` of its weights where ``keep`` was requested.

    ``nats``: the loss per token. ``increase``: perplexity over the dense model's, less one.
    """

    target: str
    method: str
    keep: float
    kept: float
    nats: float
    perplexity: float
    increase: float


@dataclass(frozen=True)
class Ablation:
    """The cost of each target alone at each kept fraction, on the text of ``dense``.

    ``file``: the cache. ``measured``: how many of ``results`` this run measured. ``picture``: the heat map.
    """

    model: str
    dense: Perplexity
    results: list[Ablated]
    keeps: list[float]
    calibration: str
    file: str
    picture: str
    measured: int
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    warnings: list[str]


@dataclass(frozen=True)
class Loss:
    """Nats per token with one target alone shrunk in all layers."""

    target: str
    method: str
    keep: float
    options: dict[str, Any]
    nats: float


@dataclass(frozen=True)
class Losses:
    """Losses measured under a ``key``; ``dense``: of the model as it is."""

    format: int = field(default=_FORMAT, kw_only=True)
    key: dict[str, Any]
    dense: Perplexity | None = None
    losses: list[Loss] = field(default_factory=list)

    def of(self, asked: Mapping[str, Any]) -> float | None:
        """Return the loss of a target, method, fraction and options, if it was measured."""
        return next((each.nats for each in self.losses if asked.items() <= asdict(each).items()), None)

    def save(self, path: Path) -> None:
        """Write the file. Raises OutOfResources if that fails."""
        write_file(path, json_text(asdict(self)))


def load_losses(path: Path, key: Mapping[str, Any]) -> Losses | None:
    """Return the losses of an earlier run, if any. Raises UserError if the file holds anything else."""
    if not path.exists():
        return None
    try:
        found = TypeAdapter(Losses).validate_json(path.read_bytes())
        if (found.format, found.key) == (_FORMAT, key):
            return found
    except (OSError, ValueError):
        pass
    raise UserError(
        f"{path} holds no results of lrc eval --ablate for what its name says; remove it, or pass --fresh"
    )
