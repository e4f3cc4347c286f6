"""The result of ``lrc eval``: one model, or two on the same texts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lrc.evaluation.pair import Pair
from lrc.evaluation.perplexity import Perplexity
from lrc.evaluation.tasks import TaskScore
from lrc.run.versions import versions


@dataclass(frozen=True)
class Evaluated:
    """A model, as the user named it, with a perplexity for each text and window length, and scores on tasks."""

    model: str
    perplexity: list[Perplexity]
    tasks: list[TaskScore] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """One model, or two with the pair of figures for each text and length; ``versions`` if tasks were run."""

    of: Evaluated
    against: Evaluated | None = None
    pairs: list[Pair] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """Caveats of the texts, the ratios and the tasks, each once."""
        figures = [p for each in (self.of, self.against) if each for p in each.perplexity]
        texts = [note for figure in figures for note in figure.notes]
        ratios = [note for pair in self.pairs for note in pair.notes]
        tasks = [note for score in self.of.tasks for note in score.notes]
        return list(dict.fromkeys([*texts, *ratios, *tasks]))

    def with_tasks(
        self, of: list[TaskScore] | None = None, against: list[TaskScore] | None = None
    ) -> Comparison:
        """Return the comparison with scores on tasks, and the versions that they depend on."""
        both = (self.of, of), (self.against, against)
        ours, theirs = (each and replace(each, tasks=scores or []) for each, scores in both)
        return replace(self, of=ours, against=theirs, versions=versions("lm_eval", "torch", "transformers"))

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        found = asdict(self.of) | ({"versions": self.versions} if self.versions else {})
        if self.against is not None:
            found |= {
                "against": asdict(self.against),
                "ratio": [pair.ratio for pair in self.pairs],
                "ratio_of": [pair.ratio_of for pair in self.pairs],
                "tokens": [pair.tokens and asdict(pair.tokens) for pair in self.pairs],
                "notes": self.notes,
            }
        return found
