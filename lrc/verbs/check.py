"""Estimate sizes and memory of a compression, from headers alone: what ``lrc check`` calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lrc.allocation import ALLOCATORS
from lrc.allocation.sizing import jobs_to_measure
from lrc.calibration.draw import too_few
from lrc.checkpoint.sizes import size_of
from lrc.estimate import memory
from lrc.estimate.sizes import output_size, target_sizes
from lrc.hub.loader import load_tokenizer
from lrc.plan.job import make_job, open_checkpoint
from lrc.plan.library import PlanLike, find_draft
from lrc.records.check import Check
from lrc.run.offload import Place
from lrc.run.settings import Run, default_batch, find_dtype, generating_batch
from lrc.text.chat import has_template
from lrc.text.datasets import DATASETS, GENERAL, MESSAGES, SYNTHETIC
from lrc.text.mixture import Mixture, read_mixture
from lrc.text.source import DATA_DIR_VARIABLE, data_folder, local_file


def check(
    model: str | Path,
    plan: PlanLike | None = None,
    *,
    keep: float | None = None,
    changes: Mapping[str, Any] | None = None,
    run: Run = Run(),
) -> Check:
    """Return sizes, memory and warnings of a compression on a GPU with the default settings, from headers alone.

    ``plan``, ``keep`` and ``changes`` are those of ``lrc.compress``. Of ``run``, only how the model is opened matters.
    Raises UserError for a missing model, for every mistake of the plan, for a tokenizer that does not work, and for an
    unknown calibration text; texts are not read.
    """
    job = make_job(*open_checkpoint(model, run), find_draft(plan, keep, changes))
    reader, calibration, name = job.reader, job.plan.plan.calibration, job.plan.plan.allocate
    jobs = jobs_to_measure(job)
    gpu = torch.device("cuda")
    dtype = find_dtype(None, gpu, reader.dtype)
    batch, allocator = default_batch(gpu.type, job.plan.seq_len), ALLOCATORS[name]

    def memory_with(place: Place) -> memory.Memory:
        found = memory.estimate_memory(job, dtype, batch, place, losses=allocator.losses)
        if allocator.holds != "model":
            return found
        samples = found.samples, memory.HELD_OUT_SAMPLES
        held = memory.measuring_memory(jobs[-1], dtype, batch, *samples, place)
        return replace(found, peak=max(found.peak, held))

    on_device = memory_with("device")
    warnings = list(job.plan.warnings)
    if calibration.samples == "all":
        warnings.append(
            f"memory is for {memory.ASSUMED_SAMPLES} calibration blocks; all of a text may be more"
        )
    else:
        warnings += too_few(reader.architecture, job.plan, calibration.samples, losses=allocator.losses)
    if jobs:
        warnings.append(
            f"allocate {name}: lrc compress measures what sizes cost and then chooses them; all figures here are at "
            "equal fractions"
        )
    assert calibration.data is not None, "a job names its texts"
    mixture = read_mixture(calibration.data)
    mixture.check(calibration.samples)
    tokenizer = load_tokenizer(job.model.path, trust_remote_code=run.trust_remote_code)
    warnings += _sources(mixture, tokenizer)
    if SYNTHETIC in mixture.names:
        batch = min(generating_batch(job.plan.seq_len), on_device.samples)
        needed = memory.generating_memory(job, dtype, batch)
        warnings.append(f"the whole model writes synthetic text beforehand: about {needed:,} bytes")
    return Check(
        model=job.model.source,
        plan=job.draft.name,
        keep=job.plan.keep,
        with_tables=job.plan.with_tables,
        before=size_of(reader.tensors.values(), reader.architecture, reader.dtype, {}),
        after=output_size(job),
        targets=target_sizes(job),
        memory=on_device,
        least_memory=memory_with("host"),
        warnings=warnings,
    )


def _sources(mixture: Mixture, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return warnings about sources of the general mixture that may be left out."""
    if not mixture.general:
        return []
    found, folder, names = [], data_folder(None), mixture.names
    chats = [name for name in names if DATASETS[name].column == MESSAGES]
    if not has_template(tokenizer):
        found = [
            f"calibration on {GENERAL} leaves out {', '.join(chats)}: the tokenizer has no chat template"
        ]
        names = [name for name in names if name not in chats]
    if remote := [name for name in names if local_file(DATASETS[name], "", "calibration", folder) is None]:
        where = f"in {folder}" if folder else f"on this machine ({DATA_DIR_VARIABLE} names no folder)"
        found.append(
            f"calibration on {GENERAL}: {', '.join(remote)} not {where}; lrc compress reads them from the hub, and "
            "leaves out those that the hub does not give"
        )
    return found
