"""The summary table: what was done to each kind of target, over the layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """All layers' records of one target and method.

    ``predicted`` and ``measured``: root of the mean squared relative error over the layers; ``kl``: mean KL divergence
    of the attention distribution in nats per query, where that is what was measured.
    """

    target: str
    method: str
    layers: int
    smallest: int
    largest: int
    kept: int
    whole: int
    predicted: float
    measured: float | None
    kl: float | None


def summarise(records: Iterable[dict[str, Any]]) -> list[Group]:
    """Group the records of a report by target and method, in the order they first appear."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["target"], record["method"]), []).append(record)
    return [_group(target, method, found) for (target, method), found in groups.items()]


def _group(target: str, method: str, records: list[dict[str, Any]]) -> Group:
    sizes = [record["size"] for record in records]
    measured = [r["measured"] for r in records]
    return Group(
        target=target,
        method=method,
        layers=len(records),
        smallest=min(sizes),
        largest=max(sizes),
        kept=sum(record["kept"] for record in records),
        whole=sum(record["whole"] for record in records),
        predicted=_relative([record["predicted"] for record in records]),
        measured=_relative(measured) if all(m["error"] is not None for m in measured) else None,
        kl=_mean([m["kl"] for m in measured]) if all(m["kl"] is not None for m in measured) else None,
    )


def _relative(errors: list[dict[str, Any]]) -> float:
    return _mean([e["error"] / e["reference"] if e["reference"] else 0.0 for e in errors]) ** 0.5


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
