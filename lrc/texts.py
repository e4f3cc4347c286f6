"""The two texts of a measurement: what moments are taken of, and what is held out of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lrc.errors import UserError
from lrc.job import Job
from lrc.text.blocks import calibration_blocks, tokenize
from lrc.text.datasets import DATASETS
from lrc.text.held_out import held_out_blocks
from lrc.text.source import Text, read_text


@dataclass(frozen=True)
class Texts:
    """Token blocks (n, tokens) to take moments of and to measure on, and the texts that they are of."""

    calibration: Text
    blocks: Tensor
    held_out: Text
    held_blocks: Tensor

    @property
    def warnings(self) -> list[str]:
        """What a reader of the plan should know of the texts."""
        warnings = list(self.calibration.notes)
        data_set = DATASETS.get(self.held_out.name)
        if data_set and self.held_out.split == data_set.evaluation:
            measured = f"{self.held_out.label} is what perplexity is measured on"
            warnings.append(f"{measured}: sizes were chosen on it, so that figures on it flatter")
        return warnings

    @property
    def fitted_to(self) -> str:
        """The calibration text and its blocks in words."""
        return _named(self.calibration, self.blocks)

    @property
    def measured_on(self) -> str:
        """The held-out text and its blocks in words."""
        return _named(self.held_out, self.held_blocks)


def draw_texts(
    job: Job,
    tokenizer: PreTrainedTokenizerBase,
    calib: str | None,
    held_out: str | None,
    samples: int,
    folder: Path | None,
) -> Texts:
    """Read a job's calibration text and the first ``samples`` blocks of a held-out one, by default of the same corpus.

    Raises UserError where a text cannot be had or is too short, and where the two overlap.
    """
    settings, builtin = job.plan.plan.calibration, job.model.builtin
    calibration = read_text(
        calib or settings.data or ("builtin" if builtin else "wikitext2"), "calibration", folder
    )
    spec = held_out or ("builtin:train" if builtin else "wikitext2:validation")
    # A bare name means the test split to eval; nothing is chosen on that unasked.
    if spec in DATASETS and "validation" in DATASETS[spec].splits:
        spec = f"{spec}:validation"
    text = read_text(spec, "evaluation", folder)
    with _about(f"calibration on {calibration.label}"):
        ids = tokenize(tokenizer, calibration.text)
        blocks = calibration_blocks(ids, settings.samples, job.plan.seq_len, settings.seed)
    with _about(f"held-out text {text.label}"):
        held_ids = ids if text.sha256 == calibration.sha256 else tokenize(tokenizer, text.text)
        return Texts(calibration, blocks, text, held_out_blocks(held_ids, samples, blocks))


@contextmanager
def _about(what: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def _named(text: Text, blocks: Tensor) -> str:
    return f"{text.label} ({blocks.shape[0]} blocks of {blocks.shape[1]} tokens)"
