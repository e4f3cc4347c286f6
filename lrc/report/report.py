"""What a compression did and what it cost, as one typed, versioned record."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from lrc.checkpoint.sizes import Size
from lrc.evaluation.perplexity import Perplexity
from lrc.plan.resolved import Share
from lrc.refit import RefitRecord
from lrc.scale import LogitScale

REPORT_VERSION = 1


@dataclass(frozen=True)
class PerplexityChange:
    """Perplexity of the original and of the saved, reloaded output on the same windows."""

    before: Perplexity
    after: Perplexity

    @property
    def ratio(self) -> float:
        """After over before."""
        return self.after.value / self.before.value


@dataclass(frozen=True)
class Report:
    """One compression. ``keep``: kept over original weights of the decoder's projections; ``with_tables``: the same of
    these and of the tables that the plan names, None where it names none. ``targets``: a record for each thing shrunk
    (see ``lrc.compressor``). ``scale``: what the logits were scaled by. ``states``: where hidden states waited between
    two layers. ``seconds`` by stage; ``peak_bytes`` of ``host`` and ``device``.
    """

    model: str
    plan: str
    out: str
    keep: float
    with_tables: Share | None
    before: Size
    after: Size
    perplexity: list[PerplexityChange]
    targets: list[dict[str, Any]]
    refits: list[RefitRecord]
    scale: LogitScale | None
    calibration: dict[str, Any]
    device: str
    dtype: str
    states: str
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    warnings: list[str]
    versions: dict[str, str]
    version: int = REPORT_VERSION

    def to_json(self) -> str:
        """The record as JSON; infinite and NaN values are written as strings, which JSON has no numbers for."""
        return json.dumps(plain(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """The same value with floats that JSON cannot hold spelt out."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return str(value)
    return value
