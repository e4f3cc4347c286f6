"""Shrinks each projection and each component alone, in all layers at once: what ``lrc eval --ablate`` calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lrc.allocation.contract import Setting
from lrc.calibration.draw import Texts
from lrc.calibration.key import blocks_key, digest, gradients_key
from lrc.checkpoint.durable import write_text, written
from lrc.errors import UserError
from lrc.estimate.room import memory_advice
from lrc.evaluation.folder import Loading, loaded
from lrc.evaluation.passage import Passage, choose_seq_lens, passages
from lrc.evaluation.perplexity import measure
from lrc.hub.names import default_text
from lrc.inspection.ablation import (
    asked_of,
    choose_targets,
    coarse_notes,
    losses,
    result_of,
    shrinking_job,
    shrinks,
)
from lrc.plan.job import Job
from lrc.plan.precedence import COMPONENTS
from lrc.records.ablation import Ablation
from lrc.records.losses import Loss, Losses, load_losses
from lrc.report.ablation import picture
from lrc.run.offload import States
from lrc.run.processes import Ranks
from lrc.run.settings import Run
from lrc.run.versions import versions
from lrc.text.source import read_text
from lrc.text.spec import DataLike
from lrc.verbs.setup import Setup, set_up

KEEPS = (0.5, 0.25, 0.125)


def ablate(
    model: str | Path,
    *,
    keeps: Sequence[float] | None = None,
    method: str | None = None,
    ppl: str | None = None,
    seq_len: int | None = None,
    max_windows: int | None = None,
    calib: DataLike | None = None,
    fresh: bool = False,
    out: str | Path = ".",
    run: Run = Run(),
) -> Ablation:
    """Measure perplexity with each projection and each component alone shrunk to fractions ``keeps`` of its weights, in
    all layers at once, without a refit: a3 shrinks components and whitened_svd projections, or ``method`` what it can.

    Solutions are fitted to the original's activations on the calibration text, as for ``lrc.compress``; perplexity is
    by the protocol of ``lrc.evaluate``, on one text. Only one layer is on the device at a time, with the hidden states
    of the calibration text and of the windows at every fraction where there is room. Results are cached in
    ``out/MODEL.ablation.KEY.json``; an interrupted run resumes from it, and only new fractions are measured.
    ``fresh=True`` ignores the cache. The heat map lies beside it. Raises UserError for what the user can mend.
    """
    setup = set_up(model, run)
    asked = check_keeps(KEEPS if keeps is None else keeps)
    jobs = {
        target: [shrinking_job(setup.model, setup.reader, target, name, keep) for keep in asked]
        for target, name in choose_targets(setup.reader.architecture, method).items()
    }
    folder = Path(out)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; results are kept there")
    some = next(iter(jobs.values()))[0]
    (length,) = choose_seq_lens([("the model", setup.reader.config)], seq_len)
    text = read_text(ppl or default_text(setup.model.source), "evaluation", run.data_folder)
    (passage,) = passages(setup.tokenizer, [text], [length], max_windows)
    texts = setup.texts(some, calib)
    key = _key(setup, some, passage, texts)
    setup.processes.agree(key)
    cache = _Cache(folder / f"{setup.model.name}.ablation.{digest(key)}.json", setup.processes)
    known = cache.read(key, fresh=fresh)
    # Each group takes one walk, so that moments are taken once for all of it, and is kept when it is done.
    groups = [
        [job for target in jobs if (target in COMPONENTS) == inside for job in jobs[target]]
        for inside in (True, False)
    ]
    missing = [[job for job in group if shrinks(job) and known.of(asked_of(job)) is None] for group in groups]
    known = _measure(setup, some, missing, passage, texts, known, cache)
    assert known.dense is not None
    results = [result_of(job, known) for each in jobs.values() for job in each]
    ablation = Ablation(
        model=setup.model.source,
        dense=known.dense,
        results=results,
        keeps=list(asked),
        calibration=texts.fitted_to,
        file=str(cache.file),
        picture=str(cache.file.with_suffix(".svg")),
        measured=sum(map(len, missing)),
        seconds=setup.watch.seconds,
        peak_bytes=setup.watch.peak_bytes,
        warnings=[*dict.fromkeys([*passage.notes, *texts.warnings]), *coarse_notes(results)],
    )
    if setup.processes.first:
        with written(drawn := Path(ablation.picture)):
            write_text(drawn, picture(ablation))
    return ablation


@dataclass(frozen=True)
class _Cache:
    """The file of what was measured, which the first process reads and writes."""

    file: Path
    processes: Ranks

    def read(self, key: dict[str, Any], *, fresh: bool) -> Losses:
        """Return what an earlier run measured with the same key."""
        found = load_losses(self.file, key) if self.processes.first and not fresh else None
        return self.processes.share(found) or Losses(key)

    def save(self, known: Losses) -> Losses:
        """Write what is known by now, and return it."""
        if self.processes.first:
            known.save(self.file)
        return known


def _key(setup: Setup, job: Job, passage: Passage, texts: Texts) -> dict[str, Any]:
    """Return everything that decides a figure."""
    blocks = texts.calibration.blocks
    return {
        "model": setup.reader.fingerprint,
        "text": blocks_key(passage.cut),
        "calibration": blocks_key(blocks),
        "first token": job.plan.first_token,
        "gradients": gradients_key(blocks, job.plan.plan.calibration),
        "dtype": setup.dtype_name,
        "versions": versions("torch", "transformers"),
    }


def _measure(
    setup: Setup,
    some: Job,
    groups: list[list[Job]],
    passage: Passage,
    texts: Texts,
    known: Losses,
    cache: _Cache,
) -> Losses:
    """Measure the model as it is, where that is not known, and each group of jobs; every result is saved at once."""
    processes, folder = setup.processes, cache.file.parent
    advance = setup.run.stage("ablate", setup.reader.architecture.layers * sum(map(bool, groups)))
    batch = setup.batch_size(some)
    advice = f"{f'--batch-size below {batch}, ' if batch > 1 else ''}a shorter --seq-len, or --device cpu"
    with memory_advice(advice):
        if known.dense is None:
            with setup.watch.stage("dense"):
                loading = Loading(setup.device, setup.dtype, folder, setup.run)
                with loaded([setup.model.path], len(setup.tokenizer), loading) as models:
                    dense = measure(models[0], passage, setup.tokenizer, Run(processes=processes))
            known = cache.save(replace(known, dense=dense))
        for jobs in filter(None, groups):
            place = setup.offload(some, len(processes.mine(texts.calibration.blocks)))
            setting = Setting(
                setup.reader,
                [job.plan for job in jobs],
                texts,
                setup.device,
                setup.dtype,
                batch,
                states=States(place, folder),
                ranks=processes,
            )
            with setup.watch.stage("ablate"):
                nats = losses(setting, passage.cut, folder, advance)
            costs = [Loss(**asked_of(job), nats=value) for job, value in zip(jobs, nats, strict=True)]
            known = cache.save(replace(known, losses=[*known.losses, *costs]))
    return known


def check_keeps(keeps: Sequence[float]) -> tuple[float, ...]:
    """Fractions to keep, largest first. Raises UserError where one is none, or comes twice."""
    if not keeps or any(not 0 < keep < 1 for keep in keeps) or len(set(keeps)) < len(keeps):
        raise UserError(
            f"--keeps {','.join(f'{keep:g}' for keep in keeps)}: fractions are distinct, above 0 and below 1"
        )
    return tuple(sorted(keeps, reverse=True))
