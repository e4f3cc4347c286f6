"""The texts of an allocation: what moments are taken of and, where it measures, what is held out of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lrc.hub.names import default_text
from lrc.plan.job import Job
from lrc.text.blocks import held_out_blocks, tokenize
from lrc.text.datasets import DATASETS
from lrc.text.mixture import Calibration, Source, about, read_mixture
from lrc.text.source import Text, read_text
from lrc.text.spec import DataLike


@dataclass(frozen=True)
class Texts:
    """What moments are taken of and, where asked for, the text and its token blocks (n, tokens) to measure on."""

    calibration: Calibration
    held_out: Text | None = None
    held_blocks: Tensor | None = None

    @property
    def warnings(self) -> list[str]:
        """What a reader of the plan should know of the texts."""
        warnings = list(self.calibration.notes)
        if self.held_out is None:
            return warnings
        data_set = DATASETS.get(self.held_out.name)
        if data_set and self.held_out.split == data_set.evaluation:
            measured = f"{self.held_out.label} is what perplexity is measured on"
            warnings.append(f"{measured}: sizes were chosen on it, so that figures on it flatter")
        return warnings

    @property
    def fitted_to(self) -> str:
        """The calibration text and its blocks in words."""
        return _named(self.calibration.label, self.calibration.blocks)

    @property
    def measured_on(self) -> str | None:
        """The held-out text and its blocks in words."""
        if self.held_out is None or self.held_blocks is None:
            return None
        return _named(self.held_out.label, self.held_blocks)


def draw_texts(
    job: Job,
    tokenizer: PreTrainedTokenizerBase,
    calib: DataLike | None,
    held_out: str | None,
    samples: int | None,
    folder: Path | None,
    generate: Callable[[int], Source],
) -> Texts:
    """Draw a job's calibration blocks: of ``calib``, else of what its plan names, else of its model's own text; and
    the first ``samples`` of a held-out text, by default of the same corpus, where ``samples`` is not None.

    ``generate`` makes blocks of synthetic text. Raises UserError as ``lrc.text.mixture`` does, where a text cannot be
    had or is too short, and where the held-out one overlaps a source.
    """
    text = (
        None if samples is None else _held_out(job, held_out, folder)
    )  # known to be there before any is generated
    settings = job.plan.plan.calibration
    planned = settings.data or default_text(job.model.source)
    mixture = read_mixture(planned if calib is None else calib)
    calibration = mixture.draw(tokenizer, settings.samples, job.plan.seq_len, settings.seed, folder, generate)
    if text is None or samples is None:
        return Texts(calibration)
    with about(f"held-out text {text.label}"):
        ids = tokenize(tokenizer, text.text)
        return Texts(calibration, text, held_out_blocks(ids, samples, calibration.blocks))


def _held_out(job: Job, named: str | None, folder: Path | None) -> Text:
    default = "builtin:train" if job.model.builtin else "wikitext2:validation"
    spec = default if named is None else named
    # A bare name means the test split to eval; nothing is chosen on that unasked.
    if spec in DATASETS and "validation" in DATASETS[spec].splits:
        spec = f"{spec}:validation"
    return read_text(spec, "evaluation", folder)


def _named(label: str, blocks: Tensor) -> str:
    count, length = blocks.shape
    return f"{label} ({count} block{'s' * (count != 1)} of {length} tokens)"
