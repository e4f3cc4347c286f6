"""Perplexities of one model, or of two beside each other on the same texts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from lrc.evaluation.perplexity import Perplexity


@dataclass(frozen=True)
class Evaluated:
    """A model, as the user named it, and its perplexity on each text."""

    model: str
    perplexity: list[Perplexity]


@dataclass(frozen=True)
class Pair:
    """Two models' figures on one text."""

    ours: Perplexity
    theirs: Perplexity

    @property
    def same_tokens(self) -> bool:
        """Whether both models read the text as the same tokens; perplexities, per token, compare only then."""
        return self.ours.ids_sha256 == self.theirs.ids_sha256

    @property
    def ratio_of(self) -> Literal["perplexity", "bits_per_byte"]:
        """What the ratio is of."""
        return "perplexity" if self.same_tokens else "bits_per_byte"

    @property
    def ratio(self) -> float | None:
        """Ours over theirs; None where it is of bits per byte and one of them has none."""
        if self.same_tokens:
            return self.ours.value / self.theirs.value
        ours, theirs = self.ours.bits_per_byte, self.theirs.bits_per_byte
        return ours / theirs if ours is not None and theirs else None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the ratio has to know."""
        if self.same_tokens:
            return ()
        return (
            f"{self.ours.data}: the tokenizers differ, so perplexities and windows are of different tokens; "
            "the ratio is of bits per byte",
        )


@dataclass(frozen=True)
class Comparison:
    """What was asked for, and what it is held against if anything."""

    of: Evaluated
    against: Evaluated | None = None

    @property
    def pairs(self) -> list[Pair]:
        """The two figures of each text; empty without another model."""
        if self.against is None:
            return []
        return [Pair(*both) for both in zip(self.of.perplexity, self.against.perplexity, strict=True)]

    @property
    def notes(self) -> list[str]:
        """What is to be known of the texts and of the ratios, each thing once."""
        figures = [p for each in (self.of, self.against) if each for p in each.perplexity]
        texts = [note for figure in figures for note in figure.notes]
        return list(dict.fromkeys([*texts, *(note for pair in self.pairs for note in pair.notes)]))

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        found = asdict(self.of)
        if self.against is not None:
            found |= {
                "against": asdict(self.against),
                "ratio": [pair.ratio for pair in self.pairs],
                "ratio_of": [pair.ratio_of for pair in self.pairs],
                "notes": self.notes,
            }
        return found
