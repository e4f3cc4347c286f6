"""The result of ``lrc bench``: a row for each case, and the ratios between two models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lrc.benchmark.cases import Case
from lrc.benchmark.measure import Timing

BENCH_VERSION = 1


@dataclass(frozen=True)
class Model:
    """A model as the user named it, the bytes of its tensors, and the number of merged products."""

    name: str
    weight_bytes: int
    merged: int


@dataclass(frozen=True)
class Row:
    """One case: our figures, those of another model if there is one, and the ratios between them."""

    case: Case
    ours: Timing
    theirs: Timing | None = None

    @property
    def speedup(self) -> float | None:
        """Our tokens per second over theirs."""
        return self.theirs and self.ours.tokens_per_second / self.theirs.tokens_per_second

    @property
    def expected(self) -> float | None:
        """The speedup if only bytes read (decode) or operations (prefill) took time."""
        return self.theirs and self.theirs.work / self.ours.work

    @property
    def reached(self) -> float | None:
        """The speedup over the expected one."""
        return self.speedup / self.expected if self.speedup and self.expected else None

    @property
    def slower(self) -> bool:
        """Whether the samples support that we are slower: the intervals of both medians are apart."""
        ours, theirs = self.ours.interval, self.theirs and self.theirs.interval
        return bool(ours and theirs and ours[1] < theirs[0])

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        sides = {
            name: asdict(side) | {"tokens_per_second": side.tokens_per_second, "spread": side.spread}
            for name, side in (("ours", self.ours), ("theirs", self.theirs))
            if side
        }
        ratios = {"speedup": self.speedup, "expected": self.expected, "reached": self.reached}
        of = {"prefill": "operations", "decode": "bytes"}[self.case.phase]
        return {**asdict(self.case), **sides, **(ratios | {"expected_of": of} if self.theirs else {})}


@dataclass(frozen=True)
class Bench:
    """All figures of a run. ``interleaved``: samples of both models alternate; else one model ran after the other."""

    of: Model
    against: Model | None
    rows: list[Row]
    device: str
    dtype: str
    new_tokens: int
    interleaved: bool
    versions: dict[str, str]
    version: int = BENCH_VERSION

    @property
    def warnings(self) -> list[str]:
        """Cases in which a model of no more bytes is surely slower, and caveats of the ratios."""
        if self.against is None:
            return []
        found = []
        if self.of.weight_bytes <= self.against.weight_bytes:
            found = [
                f"{row.case}: {self.of.name} is slower than {self.against.name}, {row.speedup:.3f} of its tokens per "
                f"second, with {self.of.weight_bytes / self.against.weight_bytes:.3f} of its weights"
                for row in self.rows
                if row.slower
            ]
        if not self.interleaved:
            found.append(
                "the models do not fit on the device together, so one was measured after the other: a warmer or "
                "shared device slows the second"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {**asdict(self), "rows": [row.as_dict() for row in self.rows], "warnings": self.warnings}
