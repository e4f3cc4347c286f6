"""Shrinks each projection and each component alone, in all layers at once: what ``lrc eval --ablate`` calls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lrc.allocation.contract import Advance, Setting
from lrc.allocation.walk import walk
from lrc.checkpoint.durable import write_text, written
from lrc.checkpoint.reader import CheckpointReader
from lrc.curves import blocks_key, digest, gradients_key, versions
from lrc.errors import UserError, nearest
from lrc.evaluation.folder import Loading, loaded
from lrc.evaluation.nll import token_nll
from lrc.evaluation.passage import choose_seq_lens, passages
from lrc.evaluation.perplexity import Progress, measure
from lrc.families import Architecture
from lrc.hub.names import ResolvedModel, default_text, resolve_model
from lrc.hub.tokenizer import load_tokenizer
from lrc.job import Job, default_batch, find_device, find_dtype
from lrc.losses import Loss, Losses, load_losses
from lrc.methods import methods
from lrc.methods.contract import Solution
from lrc.moments import COLLECTORS
from lrc.plan.data import DataLike
from lrc.plan.layers import COMPONENTS
from lrc.plan.resolve import parse_plan, resolve
from lrc.plan.resolved import Assignment
from lrc.ranks import ALONE, Ranks
from lrc.report.ablation import Ablated, Ablation, ablated, picture
from lrc.room import choose_place, memory_advice, place_for
from lrc.solve import solve
from lrc.states import States
from lrc.stopwatch import Stopwatch
from lrc.stream import ModelStream
from lrc.synthetic import synthesize
from lrc.text.blocks import batched
from lrc.text.source import read_text
from lrc.texts import draw_texts

KEEPS = (0.5, 0.25, 0.125)
# What people know of each: the published components, and for one matrix the SVD whitened by its input (SVD-LLM), which
# reads no gradients.
COMPONENT_METHOD, PROJECTION_METHOD = "a3", "whitened_svd"
_HEAD = "format: 1\nrefit: none\n"
_COARSE = 0.1  # of the fraction asked for


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
        target: [_job(found, reader, target, name, keep) for keep in asked] for target, name in chosen.items()
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
        "versions": versions(),
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
    missing = [[job for job in group if _shrinks(job) and known.of(_asked(job)) is None] for group in groups]
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
                costs = [Loss(**_asked(job), nats=value) for job, value in zip(each, nats, strict=True)]
                known = replace(known, losses=[*known.losses, *costs])
                if ranks.first:
                    known.save(file)
    assert known.dense is not None
    results = [_result(job, known) for each in jobs.values() for job in each]
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
        warnings=[*dict.fromkeys([*passage.notes, *texts.warnings]), *_coarse(results)],
    )
    if ranks.first:
        with written(drawn := Path(ablation.picture)):
            write_text(drawn, picture(ablation))
    return ablation


def losses(setting: Setting, cut: Tensor, scratch: Path, advance: Advance) -> list[float]:
    """Nats per token of windows (windows, n) with what each of a setting's plans asks for done in all layers at once.

    The plans' own windows go through the model side by side, behind one walk on the calibration text; ``advance`` is
    called with the layers done. States that have no room in memory go to files in ``scratch``.
    """
    reader, ranks = setting.reader, setting.ranks
    mine = ranks.mine(cut)
    held = mine.numel() * reader.architecture.hidden * setting.dtype.itemsize * len(setting.plans)
    states = States(place_for(held, setting.device), scratch)
    # As transformers runs the whole model, not with the float32 stream that moments are taken of.
    text = ModelStream(reader, setting.device, setting.dtype, states, ranks=ranks, residual=setting.dtype)
    ids = batched(mine, setting.batch_size)
    batches = text.embed(ids)
    hidden = [[batch.hidden for batch in batches] for _ in setting.plans]
    for stop in walk(setting):
        index = stop.layer
        assert index is not None, "an ablation plan leaves what is outside the layers alone"

        def solution(
            assignment: Assignment | None, problems: Mapping[str, Any] = stop.problems
        ) -> Solution | None:
            return solve(problems[assignment.target], assignment) if assignment else None

        assigned = [next(iter(plan.unsized(index)), None) for plan in setting.plans]
        for number, solved in enumerate(ranks.spread(assigned, solution)):
            if solved is None:
                layer = text.materialize(index, stop.state)
            else:
                layer = setting.reduced(text, index, stop.state, solved)
            text.advance_states(layer, index, batches, hidden[number])
        advance(1)
    tail, found = text.tail(), []
    for each in hidden:
        arriving = text.passing(each)
        nats = sum(
            float(token_nll(tail(states), one).double().sum())
            for (states,), one in zip(arriving, ids, strict=True)
        )
        found.append(math.fsum(ranks.gather(nats)) / (cut.numel() - len(cut)))
    return found


def check_keeps(keeps: Sequence[float]) -> tuple[float, ...]:
    """Fractions to keep, largest first. Raises UserError where one is none, or comes twice."""
    if not keeps or any(not 0 < keep < 1 for keep in keeps) or len(set(keeps)) < len(keeps):
        raise UserError(
            f"--keeps {','.join(f'{keep:g}' for keep in keeps)}: fractions are distinct, above 0 and below 1"
        )
    return tuple(sorted(keeps, reverse=True))


def choose_targets(architecture: Architecture, method: str | None) -> dict[str, str]:
    """The method of each component and projection of a layer; of one ``method``, of those that it solves alone.

    Raises UserError for an unknown method, and for one that solves none.
    """
    if method is not None and method not in methods():
        raise UserError(f"--method: unknown method {method!r}; {nearest(method, methods())}")
    found = {}
    for target in architecture.targets:
        component = target in COMPONENTS
        name = method or (COMPONENT_METHOD if component else PROJECTION_METHOD)
        if (target if component else "projection") in methods()[name].solvers:
            found[target] = name
    if not found:
        raise UserError(
            f"method {method!r} solves no component and no projection of a layer, so there is nothing to ablate"
        )
    return found


def _job(model: ResolvedModel, reader: CheckpointReader, target: str, method: str, keep: float) -> Job:
    """A plan that shrinks one target in all layers; UserError where it has no size that keeps so little."""
    section = "components" if target in COMPONENTS else "projections"
    text = f"{_HEAD}{section}: {{{target}: {{method: {method}, keep: {keep!r}}}}}\n"
    source = f"ablation of {target} at keep {keep:g}"
    plan = resolve(parse_plan(text, source), reader.architecture, methods(), COLLECTORS)
    return Job(model, reader, text, source, plan)


def _asked(job: Job) -> dict[str, Any]:
    """Target, method, fraction and options of a job: what one cost is of."""
    (target, entry), *_ = (
        *job.plan.plan.components.entries().items(),
        *job.plan.plan.projections.entries().items(),
    )
    first = next(iter(job.plan.layers[0].assignments), None)
    options = first.options if first else {}
    return {"target": target, "method": entry.method, "keep": entry.keep, "options": options}


def _shrinks(job: Job) -> bool:
    """Whether anything is shrunk: nearest to a fraction near 1 may be the whole, in all layers, which are alike."""
    return bool(job.plan.layers[0].assignments)


def _result(job: Job, known: Losses) -> Ablated:
    assert known.dense is not None
    asked, dense = _asked(job), known.dense.nats / known.dense.tokens
    nats = known.of(asked) if _shrinks(job) else dense
    assert nats is not None
    kept = next((a.kept / a.whole for a in job.plan.layers[0].assignments), 1.0)
    return ablated(asked["target"], asked["method"], asked["keep"], kept, nats, dense)


def _coarse(results: Sequence[Ablated]) -> list[str]:
    """What to say of sizes that are too coarse for what was asked."""
    return [
        f"{r.target} keeps {r.kept:.4g} of its weights where {r.keep:g} is asked for; its sizes are coarse"
        for r in results
        if abs(r.kept - r.keep) > _COARSE * r.keep
    ]


def _unseen(done: int) -> None:
    """Progress that nobody watches."""
