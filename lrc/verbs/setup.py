"""Open a model on a device, for the verbs that run it layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lrc.allocation.contract import Setting
from lrc.calibration.draw import Texts, held_out_text
from lrc.calibration.synthetic import synthesize
from lrc.checkpoint.reader import CheckpointReader
from lrc.estimate.room import choose_place, known_place
from lrc.hub.loader import load_tokenizer
from lrc.hub.names import ResolvedModel, default_text
from lrc.plan.job import Job, open_checkpoint
from lrc.run.offload import ON_DEVICE, Place, States
from lrc.run.processes import Processes
from lrc.run.settings import Run, default_batch, find_device, find_dtype
from lrc.run.stopwatch import Stopwatch
from lrc.text.blocks import held_out_blocks, tokenize
from lrc.text.mixture import DataLike, about, read_mixture


@dataclass(frozen=True)
class Setup:
    """A model by its headers, and the device and precision in which its layers run; no weight is read yet."""

    model: ResolvedModel
    reader: CheckpointReader
    run: Run
    device: torch.device
    dtype: torch.dtype
    watch: Stopwatch
    _told: set[str] = field(default_factory=set)

    @property
    def processes(self) -> Processes:
        """The processes that share the work."""
        return self.run.processes

    @property
    def dtype_name(self) -> str:
        """The precision, such as ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def device_name(self) -> str:
        """The name of the GPU, or ``cpu``."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises UserError if the model has none."""
        return load_tokenizer(self.model.path, trust_remote_code=self.run.trust_remote_code)

    def batch_size(self, job: Job) -> int:
        """Return how many calibration blocks of a job run at once."""
        return self.run.batch_size or default_batch(self.device.type, job.plan.seq_len)

    def offload(self, job: Job, samples: int) -> Place:
        """Return where this process keeps the hidden states of its share of ``samples`` calibration blocks."""
        asked, own = known_place(self.run.offload), len(self.processes.mine(range(samples)))
        return choose_place(asked, job, self.device, self.dtype, self.batch_size(job), own)

    def setting(self, jobs: Sequence[Job], texts: Texts, states: States = ON_DEVICE) -> Setting:
        """Return what an allocation reads: plans at several sizes, their texts, and how to run the layers."""
        plans, batch = [job.plan for job in jobs], self.batch_size(jobs[0])
        return Setting(
            self.reader,
            plans,
            texts,
            self.device,
            self.dtype,
            batch,
            states=states,
            processes=self.processes,
            start=self.run.stage,
        )

    def texts(
        self, job: Job, calib: DataLike | None, held_out: str | None = None, samples: int | None = None
    ) -> Texts:
        """Draw a job's calibration blocks: of ``calib``, else of the plan's text, else of the model's default text.

        If ``samples`` is given, also draw the first ``samples`` blocks of a held-out text. Raises UserError for a
        missing or short text, and for held-out text that overlaps a calibration source.
        """
        folder, settings = self.run.data_folder, job.plan.plan.calibration
        rows = self.reader.architecture.vocab
        # First, so that an unusable held-out text is an error before the model generates synthetic text.
        text = None if samples is None else held_out_text(job, held_out, folder)
        with about(f"held-out text {text.label if text else ''}"):
            ids = tokenize(self.tokenizer, text.text, rows) if text else None
        default = settings.data or default_text(self.model.source)
        mixture = read_mixture(default if calib is None else calib)
        generate = partial(
            synthesize, job=job, device=self.device, dtype=self.dtype, run=self.run, watch=self.watch
        )
        calibration = mixture.draw(
            self.tokenizer, settings.samples, job.plan.seq_len, settings.seed, folder, generate, rows
        )
        if text is None or ids is None or samples is None:
            return Texts(calibration)
        with about(f"held-out text {text.label}"):
            return Texts(calibration, text, held_out_blocks(ids, samples, calibration.blocks))

    def warn(self, warnings: Iterable[str]) -> None:
        """Show the user each warning that has not been shown yet."""
        warn = self.run.warn or (lambda warning: None)
        for warning in warnings:
            if warning not in self._told:
                self._told.add(warning)
                warn(warning)


def set_up(model: str | Path, run: Run) -> Setup:
    """Open a model on the run's device. Raises UserError for a missing model or device, or an unknown offload."""
    found, reader = open_checkpoint(model, run)
    device = find_device(run.device, run.processes)
    known_place(run.offload)
    return Setup(found, reader, run, device, find_dtype(run.dtype, device, reader.dtype), Stopwatch(device))
