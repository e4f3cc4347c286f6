"""What a plan comes to for a model, from headers alone: behind ``lrc check``."""

from __future__ import annotations

from dataclasses import replace

import torch

from lrc.allocation import ALLOCATORS
from lrc.allocation.sizing import unsized
from lrc.calibration.enough import too_few
from lrc.checkpoint.sizes import size_of
from lrc.estimate.memory import (
    ASSUMED_SAMPLES,
    HELD_OUT_SAMPLES,
    estimate_memory,
    generating_memory,
    measuring_memory,
)
from lrc.estimate.sizes import output_size, target_sizes
from lrc.plan.job import Job
from lrc.records.check import Check
from lrc.run.settings import default_batch, find_dtype, generating_batch
from lrc.text.datasets import SYNTHETIC
from lrc.text.mixture import read_mixture


def check(job: Job) -> Check:
    """Work out what a job will give, on a GPU and with the settings that ``lrc compress`` takes by default.

    Raises UserError where the plan asks for what its allocation cannot do, and where its calibration names texts that
    are not known or asks of them what they cannot give; the texts are not read.
    """
    reader, calibration, name = job.reader, job.plan.plan.calibration, job.plan.plan.allocate
    jobs = unsized(job)
    gpu = torch.device("cuda")
    dtype = find_dtype(None, gpu, reader.dtype)
    batch, allocator = default_batch(gpu.type, job.plan.seq_len), ALLOCATORS[name]
    memory, least = (
        estimate_memory(job, dtype, batch, place, losses=allocator.losses) for place in ("device", "host")
    )
    if allocator.holds == "model":
        memory, least = (
            replace(
                one,
                peak=max(
                    one.peak,
                    measuring_memory(jobs[-1], dtype, batch, one.samples, HELD_OUT_SAMPLES, one.place),
                ),
            )
            for one in (memory, least)
        )
    warnings = list(job.plan.warnings)
    if calibration.samples == "all":
        warnings.append(f"memory is for {ASSUMED_SAMPLES} blocks of calibration; all of a text may be more")
    else:
        warnings += too_few(reader.architecture, job.plan, calibration.samples, losses=allocator.losses)
    if jobs:
        warnings.append(
            f"allocate {name}: lrc compress finds the sizes when it has measured what they cost; until then all is "
            "worked out at equal fractions"
        )
    if calibration.data is not None:
        mixture = read_mixture(calibration.data)
        mixture.check(calibration.samples)
        if SYNTHETIC in mixture.names:
            needed = generating_memory(job, dtype, min(generating_batch(job.plan.seq_len), memory.samples))
            warnings.append(
                f"synthetic text is written by the whole model beforehand: about {needed:,} bytes"
            )
    return Check(
        model=job.model.source,
        plan=job.draft.name,
        keep=job.plan.keep,
        with_tables=job.plan.with_tables,
        before=size_of(reader.tensors.values(), reader.architecture, reader.dtype, {}),
        after=output_size(job),
        targets=target_sizes(job),
        memory=memory,
        least_memory=least,
        warnings=warnings,
    )
