"""Opens what the verbs that run a model layer by layer work on: its headers, a device, a plan, texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lrc.calibration.draw import Texts, draw_texts
from lrc.calibration.synthetic import synthesize
from lrc.checkpoint.reader import CheckpointReader
from lrc.estimate.room import choose_place, known_place
from lrc.hub.loader import load_tokenizer
from lrc.hub.names import ResolvedModel
from lrc.plan.job import Job, make_job, open_checkpoint
from lrc.plan.resolve import Draft
from lrc.run.offload import Place
from lrc.run.processes import Ranks
from lrc.run.settings import Run, default_batch, find_device, find_dtype
from lrc.run.stopwatch import Stopwatch
from lrc.text.spec import DataLike


@dataclass(frozen=True)
class Setup:
    """A model, the device on which its layers run one at a time, and in which precision; no weight is read yet."""

    model: ResolvedModel
    reader: CheckpointReader
    run: Run
    device: torch.device
    dtype: torch.dtype
    watch: Stopwatch

    @property
    def processes(self) -> Ranks:
        """The processes that share the work."""
        return self.run.processes

    @property
    def dtype_name(self) -> str:
        """The precision as people write it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def device_name(self) -> str:
        """The name of the GPU, or cpu."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises UserError where it has none."""
        return load_tokenizer(self.model.path, trust_remote_code=self.run.trust_remote_code)

    def job(self, draft: Draft) -> Job:
        """Work a plan out for the model. Raises UserError with every mistake of the plan at once."""
        return make_job(self.model, self.reader, draft)

    def batch_size(self, job: Job) -> int:
        """Return how many calibration blocks of a job run at once."""
        return self.run.batch_size or default_batch(self.device.type, job.plan.seq_len)

    def offload(self, job: Job, samples: int) -> Place:
        """Return where hidden states of so many calibration blocks, this process's part of all, wait."""
        asked = known_place(self.run.offload)
        return choose_place(asked, job, self.device, self.dtype, self.batch_size(job), samples)

    def texts(
        self, job: Job, calib: DataLike | None, held_out: str | None = None, samples: int | None = None
    ) -> Texts:
        """Draw a job's calibration text and ``samples`` blocks of a held-out one, as ``draw_texts`` does.

        Synthetic text is written here by the whole model.
        """
        generate = partial(
            synthesize, job=job, device=self.device, dtype=self.dtype, run=self.run, watch=self.watch
        )
        return draw_texts(job, self.tokenizer, calib, held_out, samples, self.run.data_folder, generate)

    def warn(self, warnings: Iterable[str]) -> None:
        """Tell the user of each warning."""
        if self.run.warn:
            for warning in warnings:
                self.run.warn(warning)


def set_up(model: str | Path, run: Run) -> Setup:
    """Open a model on the run's device. Raises UserError for a model, a device or a place that cannot be had."""
    found, reader = open_checkpoint(model, run)
    device = find_device(run.device, run.processes)
    known_place(run.offload)
    return Setup(found, reader, run, device, find_dtype(run.dtype, device, reader.dtype), Stopwatch(device))
