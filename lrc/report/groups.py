"""The summary table: what was done to each kind of target, over the layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lrc.compression.measure import Measured
from lrc.methods.contract import Prediction
from lrc.methods.sizes import SizeValue, size_text
from lrc.records.compression import TargetRecord


@dataclass(frozen=True)
class Group:
    """All layers' records of one target, method and metric of the prediction (``lrc.methods.contract.Prediction``).

    What is outside the layers has one record and counts as none of them.
    ``predicted`` and ``measured``: root of the mean squared relative error over the layers. Where the metric is
    ``kl``, ``predicted`` is the mean KL divergence of the attention distribution in nats per query and head; where it
    is ``loss``, the mean rise of the loss in nats. ``kl`` is the divergence as measured, where that is what was.
    """

    target: str
    method: str
    metric: str
    layers: int
    smallest: SizeValue
    largest: SizeValue
    kept: int
    whole: int
    predicted: float
    measured: float | None
    kl: float | None

    @property
    def size_text(self) -> str:
        """The size, or the smallest and the largest, and what there is so many of where that is no rank."""
        return size_span(self.smallest, self.largest, "-") + size_unit(self.target, self.largest)

    @property
    def predicted_text(self) -> str:
        """The prediction with its unit, nothing for a relative error."""
        units = {"kl": "nats KL", "loss": "nats of loss"}
        if self.metric in units:
            return f"{self.predicted:.2g} {units[self.metric]}"
        return f"{self.predicted:.4f}"

    @property
    def measured_text(self) -> str:
        """The measurement likewise; empty where there is none."""
        if self.kl is not None:
            return f"{self.kl:.2g} nats KL"
        return "" if self.measured is None else f"{self.measured:.4f}"


def size_span(smallest: SizeValue, largest: SizeValue, dash: str) -> str:
    """Return a size, or the smallest and the largest."""
    ends = [size_text(smallest), *([size_text(largest)] if largest != smallest else [])]
    return dash.join(ends)


def size_ends(records: Iterable[TargetRecord]) -> tuple[SizeValue, SizeValue]:
    """Return the sizes that keep the fewest and the most weights."""
    ordered = sorted(records, key=lambda record: record.kept)
    return ordered[0].size, ordered[-1].size


def size_unit(target: str, size: SizeValue) -> str:
    """What follows the size of a target: nothing where it is a rank, or says more than one number."""
    return (
        ""
        if isinstance(size, tuple)
        else {"mlp": " neurons", "qk": " per head", "ov": " per head"}.get(target, "")
    )


def summarise(records: Iterable[TargetRecord]) -> list[Group]:
    """Group the records of a report by target, method and metric, in the order they first appear."""
    groups: dict[tuple[str, str, str], list[TargetRecord]] = {}
    for record in records:
        groups.setdefault((record.target, record.method, record.predicted.metric), []).append(record)
    return [_group(*key, found) for key, found in groups.items()]


def _group(target: str, method: str, metric: str, records: list[TargetRecord]) -> Group:
    (smallest, largest), nats = size_ends(records), metric in ("kl", "loss")
    predicted, measured = [r.predicted for r in records], [r.measured for r in records]
    kl = [m.kl for m in measured if m.kl is not None]
    return Group(
        target=target,
        method=method,
        metric=metric,
        layers=sum(record.layer is not None for record in records),
        smallest=smallest,
        largest=largest,
        kept=sum(record.kept for record in records),
        whole=sum(record.whole for record in records),
        predicted=_mean([p.error for p in predicted]) if nats else _relative(predicted),
        measured=_relative(measured) if all(m.error is not None for m in measured) else None,
        kl=_mean(kl) if len(kl) == len(measured) else None,
    )


def _relative(errors: Iterable[Prediction | Measured]) -> float:
    return _mean([e.error / e.reference if e.error and e.reference else 0.0 for e in errors]) ** 0.5


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
