"""Perplexities of one model, or of two on the same windows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lrc.evaluation.perplexity import Perplexity


@dataclass(frozen=True)
class Evaluated:
    """A model, as the user named it, and its perplexity on each text."""

    model: str
    perplexity: list[Perplexity]


@dataclass(frozen=True)
class Comparison:
    """What was asked for, and what it is held against if anything."""

    of: Evaluated
    against: Evaluated | None = None

    @property
    def ratios(self) -> list[float]:
        """Perplexity over that of the other model, by text; empty without another."""
        if self.against is None:
            return []
        pairs = zip(self.of.perplexity, self.against.perplexity, strict=True)
        return [ours.value / theirs.value for ours, theirs in pairs]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        found = asdict(self.of)
        if self.against is not None:
            found |= {"against": asdict(self.against), "ratio": self.ratios}
        return found
