"""Shrink each projection and each component alone, in all layers at once: what ``lrc eval --ablate`` calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lrc.allocation.sizing import check_keeps
from lrc.calibration.draw import Texts, blocks_key, digest, gradients_key
from lrc.checkpoint.durable import write_file
from lrc.errors import UserError
from lrc.estimate.room import memory_advice
from lrc.evaluation.folder import Loading, loaded
from lrc.evaluation.passage import Passage, choose_seq_lens, passages
from lrc.evaluation.perplexity import measure
from lrc.hub.names import default_texts
from lrc.inspection.ablation import Trial, choose_targets, coarse_notes, losses
from lrc.plan.job import Job
from lrc.plan.precedence import COMPONENTS
from lrc.records.ablation import Ablation, Loss, Losses, load_losses
from lrc.report.ablation import picture
from lrc.run.offload import States
from lrc.run.settings import Run
from lrc.run.versions import versions
from lrc.text.mixture import DataLike
from lrc.text.source import read_text
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
    """Measure perplexity with one target shrunk to a fraction of its weights, for each target and each of ``keeps``.

    A target is a projection or a component. It is shrunk in all layers at once, without a refit. Components use a3 and
    projections use whitened_svd; ``method`` replaces both, and targets that it does not support are left out. Solutions
    are fitted to the original's activations on the calibration text. Perplexity is measured on one text, as by
    ``lrc.evaluate``. One layer at a time is on the device. Results are cached in ``out/MODEL.ablation.KEY.json``; an
    interrupted run resumes from it, and only new fractions are measured. ``fresh=True`` ignores the cache. Raises
    UserError for every mistake that the user can fix.
    """
    setup = set_up(model, run)
    asked = check_keeps(KEEPS if keeps is None else keeps)[::-1]
    trials = [
        Trial.of(setup.model, setup.reader, target, name, keep, calib)
        for target, name in choose_targets(setup.reader.architecture, method).items()
        for keep in asked
    ]
    if not (folder := Path(out)).is_dir():
        raise UserError(f"{folder} is not a folder; results are cached there")
    (length,) = choose_seq_lens([("the model", setup.reader.config)], seq_len)
    text = read_text(ppl or default_texts(setup.model.source)[0], "evaluation", run.data_folder)
    rows = setup.reader.architecture.vocab
    (passage,) = passages(setup.tokenizer, [text], [length], max_windows, rows, setup.first)
    job = trials[0].job
    texts, plan = setup.texts(job), job.plan
    blocks = texts.calibration.blocks
    key = {  # everything that decides a result
        "model": setup.reader.fingerprint,
        "text": blocks_key(passage.cut),
        "calibration": blocks_key(blocks),
        "first token": plan.first_token,
        "gradients": gradients_key(blocks, plan.plan.calibration),
        "dtype": setup.dtype_name,
        "versions": versions("torch", "transformers"),
    }
    setup.processes.agree(key)
    first, file = setup.processes.first, folder / f"{setup.model.name}.ablation.{digest(key)}.json"
    found = load_losses(file, key) if first and not fresh else None
    known = cached = setup.processes.share(found) or Losses(key)
    # Components and projections take one walk each, so that moments are taken once for all trials of a walk.
    unknown = [trial for trial in trials if trial.assignment and known.of(trial.key) is None]
    missing = [
        [each for each in unknown if (each.target in COMPONENTS) == inside] for inside in (True, False)
    ]
    for known in _measure(setup, job, missing, passage, texts, cached, folder):
        if first:
            known.save(file)
    assert known.dense is not None
    results = [trial.result(known) for trial in trials]
    said = dict.fromkeys([*setup.reader.warnings, *passage.notes, *texts.warnings])
    ablation = Ablation(
        model=setup.model.source,
        dense=known.dense,
        results=results,
        keeps=list(asked),
        calibration=texts.fitted_to,
        file=str(file),
        picture=str(file.with_suffix(".svg")),
        measured=sum(map(len, missing)),
        seconds=setup.watch.seconds,
        peak_bytes=setup.watch.peak_bytes,
        warnings=[*said, *coarse_notes(results)],
    )
    setup.warn(ablation.warnings)
    if first:
        write_file(Path(ablation.picture), picture(ablation))
    return ablation


def _measure(
    setup: Setup,
    job: Job,
    groups: list[list[Trial]],
    passage: Passage,
    texts: Texts,
    known: Losses,
    folder: Path,
) -> Iterator[Losses]:
    """Measure the original, unless its loss is cached, and each group of trials; yield all results after each."""
    setup.warn([*passage.notes, *texts.warnings])
    advance = setup.run.stage("ablate", setup.reader.architecture.layers * sum(map(bool, groups)))
    batch = setup.batch_size(job)
    advice = f"{f'--batch-size below {batch}, ' if batch > 1 else ''}a shorter --seq-len, or --device cpu"
    with memory_advice(advice):
        if known.dense is None:
            with setup.watch.stage("dense"):
                loading = Loading(setup.device, setup.dtype, folder, setup.run)
                with loaded([setup.model.path], len(setup.tokenizer), loading) as models:
                    dense = measure(models[0], passage, setup.tokenizer, Run(processes=setup.processes))
            known = replace(known, dense=dense)
            yield known
        states = States(setup.offload(job, len(texts.calibration.blocks)), folder)
        for trials in filter(None, groups):
            setting = setup.setting([trial.job for trial in trials], texts, states)
            with setup.watch.stage("ablate"):
                nats = losses(setting, passage.cut, folder, advance)
            costs = [Loss(**trial.key, nats=value) for trial, value in zip(trials, nats, strict=True)]
            known = replace(known, losses=[*known.losses, *costs])
            yield known
