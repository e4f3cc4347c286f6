"""Tables of a compression: what it cost, and the error of each target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from lrc.checkpoint.sizes import Size, byte_text
from lrc.compression.measure import Measured
from lrc.methods.contract import Prediction
from lrc.methods.sizes import SizeValue, size_text
from lrc.records.compression import PerplexityChange, TargetRecord
from lrc.report.table import Table, grouped, table


def cost_table(before: Size, after: Size, perplexity: Iterable[PerplexityChange] = ()) -> Table:
    """Return parameters, bytes, cache and perplexity before and after."""

    def row(name: str, old: str, new: str, ratio: float) -> dict[str, str]:
        return {":w": name, "before:n": old, "after:n": new, "ratio:n": f"{ratio:.3f}"}

    rows = [
        row(name, shown(old), shown(new), new / old)
        for name, shown, old, new in (
            ("parameters", "{:,}".format, before.parameters, after.parameters),
            ("bytes", byte_text, before.bytes, after.bytes),
            ("KV cache, bytes per token", "{:,}".format, before.kv_bytes_per_token, after.kv_bytes_per_token),
        )
    ]
    for change in perplexity:
        old, new = change.before, change.after
        label = f"perplexity, {old.data} ({old.windows} × {old.seq_len} tokens, {old.dtype})"
        rows.append(row(label, f"{old.value:.4g}", f"{new.value:.4g}", change.ratio))
        if old.bits_per_byte is not None and new.bits_per_byte is not None:
            ratio = new.bits_per_byte / old.bits_per_byte if old.bits_per_byte else math.nan
            bits = f"{old.bits_per_byte:.4f}", f"{new.bits_per_byte:.4f}"
            rows.append(row(f"bits per byte, {old.data}", *bits, ratio))
    return table(rows)


def targets_table(records: Iterable[TargetRecord]) -> Table:
    """Return a row for each target, method and metric of its prediction, over the layers.

    Relative errors are root mean squares over the layers, nats their means.
    """
    groups = grouped(records, lambda record: (record.target, record.method, record.predicted.metric))
    return table(
        {
            "target": target,
            **_outcome(some),
            "method": method,
            "layers:n:m": f"{sum(r.layer is not None for r in some)}",
        }
        for (target, method, _), some in groups.items()
    )


def every_table(records: Iterable[TargetRecord]) -> Table:
    """Return a row for each target of each layer, with options and numerics."""
    return table(
        {
            "layer:n": "" if r.layer is None else f"{r.layer}",
            "target": r.target,
            **_outcome([r]),
            "method": r.method,
            "options:w": listed(r.options),
            "numerics:w": listed({name: f"{value:.3g}" for name, value in r.numerics.items()}),
        }
        for r in records
    )


def _outcome(records: Sequence[TargetRecord]) -> dict[str, str]:
    (predicted, measured), ends = _errors(records), size_ends(records)
    return {
        "predicted error:n": predicted,
        "measured error:n": measured,
        "kept:n": f"{sum(r.kept for r in records) / sum(r.whole for r in records):.1%}",
        "size:n:m": size_span(*ends) + size_unit(records[0].target, ends[1]),
    }


def _errors(records: Sequence[TargetRecord]) -> tuple[str, str]:
    """Return predicted and measured error of records of one metric; the latter is empty if nothing was measured."""
    metric, measured = records[0].predicted.metric, [r.measured for r in records]
    if unit := {"kl": "nats KL", "loss": "nats of loss"}.get(metric):
        predicted = f"{fmean(r.predicted.error for r in records):.2g} {unit}"
    else:
        predicted = f"{_relative([r.predicted for r in records]):.4f}"
    kl = [m.kl for m in measured if m.kl is not None]
    if len(kl) == len(measured):
        return predicted, f"{fmean(kl):.2g} nats KL"
    return predicted, f"{_relative(measured):.4f}" if all(m.error is not None for m in measured) else ""


def size_span(smallest: SizeValue, largest: SizeValue) -> str:
    """Return a size, or the smallest and the largest."""
    ends = [size_text(smallest), *([size_text(largest)] if largest != smallest else [])]
    return "-".join(ends)


def size_ends(records: Iterable[TargetRecord]) -> tuple[SizeValue, SizeValue]:
    """Return the sizes that keep the fewest and the most weights."""
    ordered = sorted(records, key=lambda record: record.kept)
    return ordered[0].size, ordered[-1].size


def size_unit(target: str, size: SizeValue) -> str:
    """Return what follows the size of a target: nothing where it is a rank, or more than one number."""
    units = {"mlp": " neurons", "qk": " per head", "ov": " per head"}
    return "" if isinstance(size, tuple) else units.get(target, "")


def listed(record: Mapping[str, Any]) -> str:
    """Return names and values in a line, without those that are None."""
    return ", ".join(f"{name} {value}" for name, value in record.items() if value is not None)


def _relative(errors: Iterable[Prediction | Measured]) -> float:
    return fmean(e.error / e.reference if e.error and e.reference else 0.0 for e in errors) ** 0.5
