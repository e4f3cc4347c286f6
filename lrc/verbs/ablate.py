"""Shrinks each projection and each component alone, in all layers at once: what ``lrc eval --ablate`` calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lrc.allocation.contract import Setting
from lrc.calibration.draw import draw_texts
from lrc.calibration.key import blocks_key, digest, gradients_key
from lrc.calibration.synthetic import synthesize
from lrc.checkpoint.durable import write_text, written
from lrc.checkpoint.reader import CheckpointReader
from lrc.errors import UserError
from lrc.estimate.room import choose_place, memory_advice
from lrc.evaluation.folder import Loading, loaded
from lrc.evaluation.passage import choose_seq_lens, passages
from lrc.evaluation.perplexity import Progress, measure
from lrc.hub.names import default_text, resolve_model
from lrc.hub.tokenizer import load_tokenizer
from lrc.inspection.ablation import (
    asked_of,
    choose_targets,
    coarse_notes,
    losses,
    result_of,
    shrinking_job,
    shrinks,
)
from lrc.plan.precedence import COMPONENTS
from lrc.records.ablation import Ablation
from lrc.records.losses import Loss, Losses, load_losses
from lrc.report.ablation import picture
from lrc.run.offload import States
from lrc.run.processes import ALONE, Ranks
from lrc.run.settings import default_batch, find_device, find_dtype
from lrc.run.stopwatch import Stopwatch
from lrc.run.versions import versions
from lrc.text.source import read_text
from lrc.text.spec import DataLike

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
    data_dir: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    fresh: bool = False,
    out: str | Path = ".",
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Ablation:
    """Perplexity on a text with each projection and each component alone shrunk to fractions ``keeps`` of its weights,
    in all layers at once, without a refit: a3 shrinks components and whitened_svd projections, or ``method`` what it
    can.

    Solutions are fitted to the original's activations on the calibration text, as for ``lrc.compress``; perplexity is
    by the protocol of ``lrc.evaluate``, on one text. Only a layer is on the device, with the hidden states of the
    calibration text and of the windows at every fraction where there is room. What was measured is kept in a file in
    the folder ``out``, which has a name of its own for all that the figures hang on: a run that was stopped between the
    components and the projections goes on there, and other fractions cost themselves alone, unless ``fresh``. The heat
    map lies beside it.
    The rest is as for ``lrc.evaluate``. Raises UserError for what the user can mend.
    """
    found = resolve_model(str(model), revision=revision, allow_pickle=allow_pickle)
    reader = CheckpointReader(found.path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    asked = check_keeps(KEEPS if keeps is None else keeps)
    chosen = choose_targets(reader.architecture, method)
    jobs = {
        target: [shrinking_job(found, reader, target, name, keep) for keep in asked]
        for target, name in chosen.items()
    }
    folder = Path(out)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; results are kept there")
    place = find_device(device, ranks)
    precision = find_dtype(dtype, place, reader.dtype)
    some = next(iter(jobs.values()))[0]
    tokenizer = load_tokenizer(found.path, trust_remote_code=trust_remote_code)
    data = None if data_dir is None else Path(data_dir)
    (length,) = choose_seq_lens([("the model", reader.config)], seq_len)
    text = read_text(ppl or default_text(found.source), "evaluation", data)
    (passage,) = passages(tokenizer, [text], [length], max_windows)
    watch = Stopwatch(place)
    generate = partial(
        synthesize,
        job=some,
        device=place,
        dtype=precision,
        batch_size=batch_size,
        watch=watch,
        progress=progress,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        ranks=ranks,
    )
    texts = draw_texts(some, tokenizer, calib, None, None, data, generate)
    blocks = texts.calibration.blocks
    batch = batch_size or default_batch(place.type, some.plan.seq_len)
    key = {
        "model": reader.fingerprint,
        "text": blocks_key(passage.cut),
        "calibration": blocks_key(blocks),
        "first token": some.plan.first_token,
        "gradients": gradients_key(blocks, some.plan.plan.calibration),
        "dtype": str(precision).removeprefix("torch."),
        "versions": versions("torch", "transformers"),
    }
    ranks.agree(key)
    file = folder / f"{found.name}.ablation.{digest(key)}.json"
    known = ranks.share(load_losses(file, key) if ranks.first and not fresh else None) or Losses(key)
    waits = choose_place(None, some, place, precision, batch, len(ranks.mine(blocks)))
    # Each group takes one walk, so that moments are taken once for all of it, and is kept when it is done.
    groups = [
        [job for target in jobs if (target in COMPONENTS) == inside for job in jobs[target]]
        for inside in (True, False)
    ]
    missing = [[job for job in group if shrinks(job) and known.of(asked_of(job)) is None] for group in groups]
    steps = reader.architecture.layers * sum(map(bool, missing))
    advance = progress("ablate", steps) if progress else _unseen
    advice = f"{f'--batch-size below {batch}, ' if batch > 1 else ''}a shorter --seq-len, or --device cpu"
    with memory_advice(advice):
        if known.dense is None:
            with watch.stage("dense"):
                loading = Loading(place, precision, None, folder, allow_pickle, trust_remote_code)
                with loaded([found.path], len(tokenizer), loading) as models:
                    dense = measure(models[0], passage, tokenizer=tokenizer, ranks=ranks)
            known = replace(known, dense=dense)
            if ranks.first:
                known.save(file)
        for each in missing:
            if each:
                setting = Setting(
                    reader,
                    [job.plan for job in each],
                    texts,
                    place,
                    precision,
                    batch,
                    states=States(waits, folder),
                    ranks=ranks,
                )
                with watch.stage("ablate"):
                    nats = losses(setting, passage.cut, folder, advance)
                costs = [Loss(**asked_of(job), nats=value) for job, value in zip(each, nats, strict=True)]
                known = replace(known, losses=[*known.losses, *costs])
                if ranks.first:
                    known.save(file)
    assert known.dense is not None
    results = [result_of(job, known) for each in jobs.values() for job in each]
    ablation = Ablation(
        model=found.source,
        dense=known.dense,
        results=results,
        keeps=list(asked),
        calibration=texts.fitted_to,
        file=str(file),
        picture=str(file.with_suffix(".svg")),
        measured=sum(map(len, missing)),
        seconds=watch.seconds,
        peak_bytes=watch.peak_bytes,
        warnings=[*dict.fromkeys([*passage.notes, *texts.warnings]), *coarse_notes(results)],
    )
    if ranks.first:
        with written(drawn := Path(ablation.picture)):
            write_text(drawn, picture(ablation))
    return ablation


def check_keeps(keeps: Sequence[float]) -> tuple[float, ...]:
    """Fractions to keep, largest first. Raises UserError where one is none, or comes twice."""
    if not keeps or any(not 0 < keep < 1 for keep in keeps) or len(set(keeps)) < len(keeps):
        raise UserError(
            f"--keeps {','.join(f'{keep:g}' for keep in keeps)}: fractions are distinct, above 0 and below 1"
        )
    return tuple(sorted(keeps, reverse=True))


def _unseen(done: int) -> None:
    """Progress that nobody watches."""
