"""A model and a plan to a compressed checkpoint and its report: what ``lrc compress`` calls."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from lrc.allocation import ALLOCATORS
from lrc.allocation.curves import as_curves
from lrc.allocation.sizing import KEEPS, Sizing, default_samples, sized_by, unsized
from lrc.calibration.draw import draw_texts
from lrc.calibration.enough import too_few
from lrc.calibration.synthetic import synthesize
from lrc.checkpoint.shared import SharedStaging
from lrc.checkpoint.staging import check_output, staging
from lrc.compression.finish import (
    copied_files,
    logit_scale,
    refit_records,
    sizes,
    target_records,
    write_checkpoint,
)
from lrc.compression.loop import Compressor
from lrc.compression.refit import doubts
from lrc.estimate.room import choose_place, known_place, memory_advice
from lrc.evaluation.folder import Loading, evaluate_folder
from lrc.evaluation.passage import DEFAULT_SEQ_LEN, count_windows
from lrc.hub.names import default_text
from lrc.hub.tokenizer import load_tokenizer
from lrc.plan.job import Job, prepare
from lrc.records.compression import REPORT, CalibrationRecord, PerplexityChange, Report, TargetRecord
from lrc.report.html import html_page
from lrc.report.markdown import model_card, report_page
from lrc.report.outputs import read_beside
from lrc.run.offload import States
from lrc.run.processes import ALONE, Ranks
from lrc.run.settings import default_batch, find_device, find_dtype
from lrc.run.stopwatch import Stopwatch
from lrc.run.versions import versions
from lrc.text.blocks import tokenize
from lrc.text.mixture import Calibration
from lrc.text.source import read_text
from lrc.text.spec import DataLike
from lrc.walk.needs import reads_gradients
from lrc.walk.stream import ModelStream

Progress = Callable[[str, int], Callable[[int], object]]
Warn = Callable[[str], object]

_ALLOCATION = "allocation"
_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers")


def compress(
    model: str | Path,
    plan: str | Path,
    *,
    out: str | Path | None = None,
    calib: DataLike | None = None,
    ppl: str | Sequence[str] | None = None,
    data_dir: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    states: str | None = None,
    max_windows: int | None = None,
    fresh: bool = False,
    force: bool = False,
    beside: Sequence[str | Path] = (),
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    warn: Warn | None = None,
    ranks: Ranks = ALONE,
) -> Report:
    """Compress a checkpoint by a plan into the folder ``out`` (default ./MODEL-PLAN) and report what it cost.

    ``calib`` names texts for calibration (else the plan's, else the model's default) as
    ``lrc.text.mixture.read_mixture`` does, and ``ppl`` as ``lrc.text.source.read_text`` does those for the perplexity
    before and after, which is that of the saved folder loaded back (none if it is empty). Layers run in ``dtype``
    (default: the checkpoint's on a GPU, float32 on a CPU) and are saved in the checkpoint's. ``states``: where hidden
    states wait between two layers, one of ``offload.PLACES`` (default: the first with room). A plan that asks for an
    allocation has its sizes found first, as ``lrc.make_plan`` finds them by default. An unfinished run of the same
    settings is taken up again unless ``fresh``. ``progress`` is called with a stage's name and length, and gives the
    function to call with steps done; ``warn`` with every warning of the report before the work begins. ``ranks`` are
    the processes that share the work (``launched``), each of which makes this call and gets the report.
    Raises UserError for what the user can mend; nothing is then named ``out``.
    """
    job = prepare(
        model, plan, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
    )
    place, asked = find_device(device, ranks), known_place(states)
    precision = find_dtype(dtype, place, job.reader.dtype)
    target = Path(job.name if out is None else out)
    check_output(target, source=job.model.path, force=force)
    others = read_beside([Path(each) for each in beside], job.model.source, job.reader.fingerprint)
    folder = None if data_dir is None else Path(data_dir)
    default = default_text(job.model.source)
    held_out = [default] if ppl is None else _specs(ppl)
    tokenizer = load_tokenizer(job.model.path, trust_remote_code=trust_remote_code)
    window = min(DEFAULT_SEQ_LEN, job.reader.architecture.positions)
    for spec in held_out:  # one that is not there or too short should be known now, not after an hour
        text = read_text(spec, "evaluation", folder)
        count_windows(text, tokenize(tokenizer, text.text), window, max_windows)
    jobs = unsized(job)  # a plan that asks for what its allocation cannot do, too, should be known now
    watch = Stopwatch(place)
    progress = progress or (lambda label, total: lambda done: None)
    generate = partial(
        synthesize,
        job=job,
        device=place,
        dtype=precision,
        batch_size=batch_size,
        watch=watch,
        progress=progress,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        ranks=ranks,
    )
    samples = default_samples(job.plan.plan.allocate)
    texts = draw_texts(job, tokenizer, calib, None, samples, folder, generate)
    calibration = texts.calibration
    batch = batch_size or default_batch(place.type, job.plan.seq_len)
    waits = choose_place(asked, job, place, precision, batch, len(ranks.mine(calibration.blocks)))
    settings = _settings(job, calibration, place, precision, batch, ranks)
    sizing = (
        Sizing(job.plan.plan.allocate, jobs, sorted(KEEPS), texts, place, precision, batch, ranks=ranks)
        if jobs
        else None
    )
    if sizing:
        settings["allocation"] = sizing.key
    ranks.agree(settings)
    warnings = [*job.plan.warnings, *calibration.notes, *_too_few(job, calibration)]
    if warn:
        for warning in warnings:
            warn(warning)
    source_folder = job.model.path
    read = [*job.reader.files, *copied_files(source_folder)]
    opened = staging(target, settings, source=source_folder, files=read, fresh=fresh, force=force)
    with opened if ranks.first else nullcontext() as own:
        stage = SharedStaging(own, ranks)
        kept_in = States(waits, stage.scratch)
        if sizing:
            with watch.stage("measure sizes"):
                sizing = replace(sizing, states=kept_in)
                job, settings["allocation"] = _allocate(job, sizing, stage, progress)
            settings["plan"] = {"source": job.plan_source, **job.plan.as_dict()}
            warnings = [*dict.fromkeys([*job.plan.warnings, *warnings])]  # with what the sizes came to
        settings["warnings"] = warnings
        advance = progress("compress", len(job.plan.layers))
        with watch.stage("load"):
            stream = ModelStream(job.reader, place, precision, kept_in, ranks=ranks)
        with memory_advice(f"--batch-size below {batch} (with --fresh), or fewer calibration samples"):
            Compressor(stream, job.plan, stage, watch).run(calibration.blocks, batch, lambda: advance(1))
        del stream
        refits = refit_records(job, own) if own else []
        settings["warnings"] = warnings = [*warnings, *doubts(refits)]
        with watch.stage("write"):
            table = write_checkpoint(job, own, settings) if own else {}
            ranks.meet()
        perplexity = []
        if held_out:
            loading = Loading(place, precision, None, stage.scratch, allow_pickle, trust_remote_code)
            advice = "the same command with --no-eval, then lrc eval with --streamed: the layers are finished"
            with watch.stage("evaluate"), memory_advice(advice):
                pair = [
                    evaluate_folder(
                        path,
                        held_out,
                        loading,
                        data_dir=folder,
                        max_windows=max_windows,
                        progress=progress,
                        ranks=ranks,
                    )
                    for path in (source_folder, stage.folder)
                ]
            perplexity = [PerplexityChange(*both) for both in zip(*pair, strict=True)]
        if own is None:
            return ranks.share(cast(Report, None))
        before, after = sizes(job, own, table)
        report = Report(
            model=job.model.source,
            revision=job.model.revision,
            fingerprint=settings["model"]["fingerprint"],
            layers=len(job.plan.layers),
            plan=job.plan_source,
            plan_text=job.plan_text,
            out=str(target),
            keep=job.plan.keep,
            with_tables=job.plan.with_tables,
            before=before,
            after=after,
            perplexity=perplexity,
            targets=[TargetRecord.from_dict(record) for record in target_records(job, own)],
            refits=refits,
            scale=logit_scale(own),
            calibration=CalibrationRecord.from_dict(settings["calibration"]),
            allocation=settings.get("allocation"),
            device=_device_name(place),
            dtype=_name(precision),
            batch_size=batch,
            processes=ranks.size,
            states=waits,
            seconds=watch.seconds,
            device_bytes=watch.device_bytes,
            peak_bytes=watch.peak_bytes,
            warnings=warnings,
            versions=settings["versions"],
        )
        own.write_file(REPORT, report.to_json())
        own.write_file("report.md", report_page(report))
        own.write_file("report.html", html_page(report, others))
        own.write_file("README.md", model_card(report))
        own.publish()
    return ranks.share(report)


def _allocate(
    job: Job, sizing: Sizing, stage: SharedStaging, progress: Progress
) -> tuple[Job, dict[str, Any]]:
    """The job with the sizes that its allocation finds, and what the manifest keeps of that.

    What sizes cost is staged first: a run that is taken up again gets the sizes it had, whatever rounding does.
    """
    if not stage.has(_ALLOCATION):
        stage.write(_ALLOCATION, {}, sizing.curves(progress).as_dict())
        gc.collect()
    curves = as_curves(stage.record(_ALLOCATION))
    sized, cost = sized_by(job, sizing.jobs[0], curves.curves)
    return sized, {**curves.key, "unit": curves.unit, "cost": cost, "loss": curves.loss}


def _too_few(job: Job, calibration: Calibration) -> list[str]:
    """Warnings of what is read of the calibration, by the allocation and by the compression."""
    losses = ALLOCATORS[job.plan.plan.allocate].losses
    return too_few(job.reader.architecture, job.plan, len(calibration.blocks), losses=losses)


def _specs(ppl: str | Sequence[str]) -> list[str]:
    return [ppl] if isinstance(ppl, str) else list(ppl)


def _settings(
    job: Job, calibration: Calibration, device: torch.device, precision: torch.dtype, batch: int, ranks: Ranks
) -> dict[str, Any]:
    """Everything that decides the output's bytes: an unfinished run is only taken up if all of it is the same."""
    run: dict[str, Any] = {"device": device.type, "dtype": _name(precision), "batch_size": batch}
    if not ranks.alone:  # sums over blocks are rounded by how these are split
        run["processes"] = ranks.size
    gradients = reads_gradients(job.reader.architecture, job.plan)
    asked = job.plan.plan.calibration
    return {
        "model": {
            "source": job.model.source,
            "revision": job.model.revision,
            "fingerprint": job.reader.fingerprint,
        },
        "plan": {"source": job.plan_source, **job.plan.as_dict()},
        "calibration": {
            **calibration.as_dict(asked.seed),
            "first_token": job.plan.first_token,
            **(
                {"gradient_samples": min(asked.gradient_samples, len(calibration.blocks))}
                if gradients
                else {}
            ),
        },
        "run": run,
        "versions": versions(*_PACKAGES),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
