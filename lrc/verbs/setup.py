"""Open a model on a device, for the verbs that run it layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lrc.allocation.contract import Setting
from lrc.calibration.draw import Texts, held_out_mixture
from lrc.calibration.synthetic import synthesize
from lrc.checkpoint.reader import CheckpointReader
from lrc.estimate.room import choose_place, known_place
from lrc.hub.loader import first_token, load_tokenizer
from lrc.hub.names import ResolvedModel
from lrc.plan.job import Job, open_checkpoint
from lrc.run.offload import ON_DEVICE, Place, States
from lrc.run.processes import Processes
from lrc.run.settings import Run, default_batch, find_device, find_dtype
from lrc.run.stopwatch import Stopwatch
from lrc.text.corpus import read_corpus
from lrc.text.mixture import DataLike, read_mixture


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

    @cached_property
    def first(self) -> int | None:
        """The token that every block and window starts with, if the model needs one."""
        return first_token(self.reader.config, self.tokenizer)

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

    def texts(self, job: Job, held_out: DataLike | None = None, samples: int | None = None) -> Texts:
        """Draw a job's calibration blocks; if ``samples`` is given, also the first ``samples`` blocks held out of them.

        ``held_out``: other texts than the default. Raises UserError for a missing or short text, and for held-out text
        that overlaps a calibration source.
        """
        settings, seq_len = job.plan.plan.calibration, job.plan.seq_len
        assert settings.data is not None, "a job names its texts"
        read = partial(
            read_corpus,
            tokenizer=self.tokenizer,
            seq_len=seq_len,
            data_dir=self.run.data_folder,
            rows=self.reader.architecture.vocab,
            first=self.first,
        )
        calibration, held = read(read_mixture(settings.data), samples=settings.samples), None
        # First, so that an unusable held-out text is an error before the model generates synthetic text.
        if samples is not None:
            mixture = held_out_mixture(job, held_out, calibration)
            held = read(mixture, samples=samples, use="held-out")
        generate = partial(
            synthesize,
            job=job,
            device=self.device,
            dtype=self.dtype,
            run=self.run,
            watch=self.watch,
            first=self.first,
        )
        drawn = calibration.draw(settings.samples, settings.seed, generate)
        if held is None or samples is None:
            return Texts(drawn)
        return Texts(drawn, held.held_out(samples, drawn.blocks))

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
