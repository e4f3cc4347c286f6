"""Compress a checkpoint by a plan: what ``lrc compress`` calls."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter

from lrc.allocation import ALLOCATORS
from lrc.allocation.sizing import KEEPS, Sizing, as_curves, default_samples, jobs_to_measure, sized_by
from lrc.calibration.draw import too_few
from lrc.checkpoint.staging import SharedStaging, Staging, check_output, staging
from lrc.compression import finish
from lrc.compression.loop import Compressor
from lrc.compression.norms import norm_warnings
from lrc.estimate.memory import ASSUMED_SAMPLES
from lrc.estimate.room import fits_measuring, memory_advice
from lrc.plan.job import Job, make_job
from lrc.plan.library import BEST, PlanLike, find_draft, read_draft
from lrc.records.compression import REPORT, CalibrationRecord, Report, TargetRecord
from lrc.report.compression import html_page, model_card, report_page
from lrc.report.outputs import Output, read_beside
from lrc.run.offload import Place, States
from lrc.run.settings import Run
from lrc.run.versions import versions
from lrc.text.corpus import Drawn
from lrc.text.mixture import DataLike
from lrc.text.source import Text
from lrc.verbs.cost import Cost, measure_cost, read_cost_texts
from lrc.verbs.setup import Setup, set_up
from lrc.walk.needs import reads_gradients
from lrc.walk.stream import ModelStream

_ALLOCATION = "allocation"


def compress(
    model: str | Path,
    plan: PlanLike | None = None,
    *,
    keep: float | None = None,
    changes: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    calib: DataLike | None = None,
    ppl: str | Sequence[str] | None = None,
    max_windows: int | None = None,
    fresh: bool = False,
    force: bool = False,
    beside: Sequence[str | Path] | None = None,
    run: Run = Run(),
) -> Report:
    """Compress a checkpoint by a plan into the folder ``out`` (default: ./MODEL-PLAN) and report size and perplexity.

    ``plan``: ``lrc.Plan``, a file, the name of a shipped plan, or YAML that begins with ``{``. Without a plan, ``keep``
    is the fraction of the weights to keep; method a3 is used, at the sizes of least cost. ``keep`` and ``changes``
    (values by dotted key, such as ``{"calibration.samples": 32}``) replace entries of the plan. ``calib``: calibration
    texts (default: the plan's, else the model's). ``ppl``: texts for the perplexity before and after, or an empty list.
    The output appears under its name before the perplexity is measured, with a report that says so. An unfinished run
    with the same settings is resumed unless ``fresh``. Raises UserError for every mistake that the user can fix;
    ``out`` does not exist then.
    """
    draft = find_draft(plan, keep, changes)
    setup = set_up(model, run)
    job, notes = make_job(setup.model, setup.reader, draft, calib), list[str]()
    if plan is None and "allocate" not in (changes or {}):
        job, note = _choose_allocation(setup, job, keep, changes)
        notes.append(note)
    target = Path(job.name if out is None else out)
    check_output(target, source=job.model.path, force=force)
    others = read_beside([Path(each) for each in beside or ()], job.model.source, job.reader.fingerprint)
    evaluated = read_cost_texts(setup, ppl, max_windows)
    work = _prepare(setup, job, notes)
    setup.processes.agree(work.settings | evaluated.key)
    setup.warn(work.warnings)
    source = job.model.path
    read = [*job.reader.files, *finish.copied_files(source)]
    opened = staging(target, work.settings, source=source, files=read, fresh=fresh, force=force)
    # Rank 0 alone has the staging folder; the other processes solve and measure with it and get its report.
    with opened if setup.processes.first else nullcontext() as own:
        stage = SharedStaging(own, setup.processes)
        work = _times_kept(work, own) if own else work
        work = _find_sizes(work, stage)
        work = _compress_layers(work, stage)
        report = _publish(work, own, target, evaluated.texts, others) if own and not own.published else None
        setup.processes.meet()
        cost = measure_cost(work.setup, work.job, stage, evaluated) if evaluated.texts else None
        if own and (cost or report is None):
            report = _report(work, own, target, cost=cost)
            setup.warn(report.warnings)
            _write_report(own, report, source, others)
    return setup.processes.share(cast(Report, report))


@dataclass(frozen=True)
class _Work:
    """A compression that is ready to start; ``settings`` are everything that decides the bytes of the output.

    ``sizing``: the allocation that finds the sizes, None where the plan has them.
    """

    setup: Setup
    job: Job
    calibration: Drawn
    sizing: Sizing | None
    batch: int
    offload: Place
    settings: dict[str, Any]
    warnings: list[str]


def _choose_allocation(
    setup: Setup, job: Job, keep: float | None, changes: Mapping[str, Any] | None
) -> tuple[Job, str]:
    """Choose measured sensitivity where the whole model fits on the device, else gradients, and return a note."""
    asked = job.plan.plan.calibration.samples
    samples = ASSUMED_SAMPLES if asked == "all" else asked
    place, batch, device = setup.offload(job, samples), setup.batch_size(job), setup.device
    fits = fits_measuring(jobs_to_measure(job)[-1], device, setup.dtype, batch, samples, place)
    fits = setup.processes.share(fits)  # rank 0 decides, as free memory differs between processes
    name = "sensitivity"
    if not fits:
        name = "fisher"
        draft = read_draft(BEST.model_copy(update={"allocate": name}), keep, changes)
        job = make_job(setup.model, setup.reader, draft, job.plan.plan.calibration.data)
    used = f"method {job.plan.plan.method}, keep {job.plan.plan.keep:g} and allocate {name}"
    reason = f"the whole model {'fits' if fits else 'does not fit'} on the device"
    return job, (
        f"no plan is given, so lrc uses {used}, as {reason}. For uniform sizes without a measurement, add "
        "--set allocate=uniform"
    )


def _prepare(setup: Setup, job: Job, notes: list[str]) -> _Work:
    """Draw the texts and fix everything that decides the output. Raises UserError for a plan that cannot be done."""
    name, jobs = job.plan.plan.allocate, jobs_to_measure(job)
    texts, batch = setup.texts(job, samples=default_samples(name)), setup.batch_size(job)
    calibration, samples = texts.calibration, len(texts.calibration.blocks)
    run: dict[str, Any] = {"device": setup.device.type, "dtype": setup.dtype_name, "batch_size": batch}
    if not setup.processes.alone:  # how blocks are split decides how sums over them are rounded
        run["processes"] = setup.processes.size
    asked = job.plan.plan.calibration
    moments = {**calibration.as_dict(asked.seed), "first_token": job.plan.first_token}
    if reads_gradients(job.reader.architecture, job.plan):
        moments["gradient_samples"] = min(asked.gradient_samples, samples)
    source = {"source": job.model.source, "revision": job.model.revision}
    settings: dict[str, Any] = {  # a run is resumed only if all of it is the same
        "model": {**source, "fingerprint": job.reader.fingerprint},
        "plan": {"source": job.draft.name, **job.plan.as_dict()},
        "calibration": moments,
        "run": run,
        "versions": versions("torch", "transformers", "safetensors", "tokenizers"),
    }
    sizing = None
    if jobs:
        sizing = Sizing(name, jobs, sorted(KEEPS), setup.setting(jobs, texts))
        settings["allocation"] = sizing.key
    few = too_few(job.reader.architecture, job.plan, samples, losses=ALLOCATORS[name].losses)
    warnings = [*notes, *job.plan.warnings, *texts.warnings, *few]
    return _Work(setup, job, calibration, sizing, batch, setup.offload(job, samples), settings, warnings)


def _times_kept(work: _Work, own: Staging) -> _Work:
    """Return the work with times that include those of the run's earlier processes, and are staged at each step."""
    watch, run = work.setup.watch, work.setup.run
    watch.resume(own.times)
    watch.save = lambda: own.write_times(watch.times())

    def progress(label: str, total: int) -> Callable[[int], object]:
        advance = run.stage(label, total)

        def step(done: int) -> None:
            advance(done)
            watch.save()

        return step

    return replace(work, setup=replace(work.setup, run=replace(run, progress=progress)))


def _find_sizes(work: _Work, stage: SharedStaging) -> _Work:
    """Return the work with the sizes that the plan's allocation finds, if the plan names one.

    The measured costs are staged first, so that a resumed run gets the same sizes.
    """
    if not work.sizing:
        return work
    with work.setup.watch.stage("measure sizes"):
        setting = replace(work.sizing.setting, states=States(work.offload, stage.scratch))
        sizing = replace(work.sizing, setting=setting)
        if not stage.has(_ALLOCATION):
            stage.write(_ALLOCATION, {}, sizing.curves(work.setup.run.progress).as_dict())
            gc.collect()
        curves = as_curves(stage.record(_ALLOCATION))
        job, cost = sized_by(work.job, sizing.jobs[0], curves.curves)
    found = {**curves.key, "unit": curves.unit, "cost": cost, "loss": curves.loss}
    plan = {"source": job.draft.name, **job.plan.as_dict()}
    settings = {**work.settings, "allocation": found, "plan": plan}
    warnings = [*dict.fromkeys([*job.plan.warnings, *work.warnings])]  # now with those about the sizes found
    work.setup.warn(warnings)
    return replace(work, job=job, settings=settings, warnings=warnings)


def _compress_layers(work: _Work, stage: SharedStaging) -> _Work:
    """Solve, assemble and stage every layer; return the work with the warnings of the refits."""
    setup, job = work.setup, work.job
    with setup.watch.stage("load"):
        states = States(work.offload, stage.scratch)
        stream = ModelStream(job.reader, setup.device, setup.dtype, states, processes=setup.processes)
    with memory_advice(f"--batch-size below {work.batch} (with --fresh), or fewer calibration samples"):
        compressor = Compressor(stream, job.plan, stage, setup.watch)
        compressor.run(work.calibration.blocks, work.batch, setup.run.stage)
    found = list[str]()
    if own := stage.own:
        scale = finish.logit_scale(own)
        found = [*(scale.warnings if scale else []), *norm_warnings(finish.norm_records(job, own))]
    setup.warn(found)
    return replace(work, warnings=[*work.warnings, *found])


def _publish(
    work: _Work, own: Staging, target: Path, texts: Sequence[Text], others: Sequence[Output]
) -> Report:
    """Write the checkpoint and its report, give it its name and return the report."""
    with work.setup.watch.stage("write"):
        advance = work.setup.run.stage("write", 1)
        finish.write_checkpoint(work.job, own, {**work.settings, "warnings": work.warnings})
        advance(1)
    report = _report(work, own, target, pending=[text.label for text in texts])
    _write_report(own, report, work.job.model.path, others)
    own.publish()
    return report


def _write_report(own: Staging, report: Report, source: Path, others: Sequence[Output]) -> None:
    """Write or replace the report in its forms, each whole or not at all; the page only after the evaluation."""
    own.write_file(REPORT, report.to_json())
    own.write_file("report.md", report_page(report))
    if not report.pending:
        own.write_file("report.html", html_page(report, others))
    own.write_file("README.md", model_card(report, source))


def _report(
    work: _Work, own: Staging, target: Path, *, pending: Sequence[str] = (), cost: Cost | None = None
) -> Report:
    """Return the report of finished layers; ``pending``: texts that are measured next."""
    setup, job, settings = work.setup, work.job, work.settings
    before, after = finish.sizes(job, own)
    return Report(
        model=job.model.source,
        revision=job.model.revision,
        fingerprint=job.reader.fingerprint,
        layers=len(job.plan.layers),
        plan=job.draft.name,
        plan_text=job.draft.text,
        out=str(target),
        keep=job.plan.keep,
        with_tables=job.plan.with_tables,
        before=before,
        after=after,
        **(vars(cost) if cost else {"perplexity": []}),
        pending=list(pending),
        targets=TypeAdapter(list[TargetRecord]).validate_python(finish.target_records(job, own)),
        refits=finish.refit_records(job, own),
        stream_norms=finish.norm_records(job, own),
        scale=finish.logit_scale(own),
        calibration=TypeAdapter(CalibrationRecord).validate_python(settings["calibration"]),
        allocation=settings.get("allocation"),
        device=setup.device_name,
        dtype=setup.dtype_name,
        batch_size=work.batch,
        processes=setup.processes.size,
        offload=work.offload,
        seconds=setup.watch.seconds,
        device_bytes=setup.watch.device_bytes,
        peak_bytes=setup.watch.peak_bytes,
        warnings=[*work.warnings, *(cost.domains.warnings if cost else [])],
        versions=settings["versions"],
    )
