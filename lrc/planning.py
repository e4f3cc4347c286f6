"""Makes plans for a budget: measures once what every size costs, then spends each budget where it saves most."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrc import __version__
from lrc.allocate import Curve
from lrc.budget import Budget, Spent, read_budgets, spend
from lrc.checkpoint.reader import CheckpointReader
from lrc.curves import Curves, load_curves, plan_sha256
from lrc.errors import UserError, nearest
from lrc.estimate import output_size
from lrc.hub.names import resolve_model
from lrc.hub.tokenizer import load_tokenizer
from lrc.job import Job, default_batch, find_device, find_dtype
from lrc.memory import free_bytes, measuring_memory
from lrc.methods import methods
from lrc.plan.data import DataLike
from lrc.plan.written import write_plan
from lrc.report.planning import Planned, Planning, Strip
from lrc.sensitivity import Sensitivity, passes, unmeasured
from lrc.solve import reads_gradients
from lrc.stopwatch import Stopwatch
from lrc.stream import ModelStream
from lrc.synthetic import synthesize
from lrc.template import templates
from lrc.text.blocks import gradient_blocks, ids_sha256
from lrc.texts import Texts, draw_texts

Progress = Callable[[str, int], Callable[[int], object]]

KEEPS = (0.9, 0.75, 0.6, 0.45, 0.3)
_MADE = "Made by lrc plan"
_PACKAGES = ("torch", "transformers")


def make_plan(
    model: str | Path,
    *,
    keep: float | Sequence[float] | None = None,
    size: int | None = None,
    kv_cache: float | None = None,
    base: str | Path | None = None,
    allocate: str = "sensitivity",
    held_out: str | None = None,
    held_out_samples: int = 8,
    keeps: Sequence[float] = KEEPS,
    calib: DataLike | None = None,
    data_dir: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    curves: str | Path | None = None,
    round_to: int = 1,
    fresh: bool = False,
    out: str | Path = "plan.yaml",
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Planning:
    """Write plans with the sizes of least predicted loss that ``keep``, ``size`` or ``kv_cache`` allows.

    ``keep``: of the decoder's weights; of several, each gets a plan, NAME-KEEP.yaml. ``size``: bytes of the checkpoint.
    ``kv_cache``: of the cache; alone it leaves the MLP whole, beside a keep it fixes what qk and ov take of that.
    ``base``: a plan without sizes, for methods, options and calibration (default: a3). What it costs to shrink each
    target alone to the fractions ``keeps`` is measured on the first ``held_out_samples`` blocks of ``held_out``
    (default: wikitext2:validation; for built-in models what calibration does not draw of builtin:train) and kept in
    ``curves`` (default: NAME.curves.json beside ``out``), to be used again where all that it hangs on is the same,
    unless ``fresh``. Sizes are multiples of ``round_to``. The rest is as for ``lrc.compress``. Raises UserError for
    what the user can mend; no plan is written then.
    """
    out = Path(out)
    store = out.with_name(f"{out.stem}.curves.json") if curves is None else Path(curves)
    budgets = read_budgets(keep, size, kv_cache)
    _check_settings(allocate, keeps, round_to, held_out_samples)
    paths = [out.with_name(f"{out.stem}-{b.keep:g}{out.suffix}") if budgets[1:] else out for b in budgets]
    _check_files([*paths, store], paths)
    found = resolve_model(str(model), revision=revision, allow_pickle=allow_pickle)
    reader = CheckpointReader(found.path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    jobs = templates(found, reader, None if base is None else str(base), sorted(keeps))
    for budget in budgets:  # one that cannot be met should be known now, not after the measurement
        _spend(budget, jobs[0], unmeasured(reader.architecture, [job.plan for job in jobs]), round_to)
    place = find_device(device)
    precision = find_dtype(dtype, place, reader.dtype)
    tokenizer = load_tokenizer(found.path, trust_remote_code=trust_remote_code)
    folder = None if data_dir is None else Path(data_dir)
    watch = Stopwatch(place)
    generate = partial(
        synthesize,
        job=jobs[0],
        device=place,
        dtype=precision,
        batch_size=batch_size,
        watch=watch,
        progress=progress,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    texts = draw_texts(jobs[0], tokenizer, calib, held_out, held_out_samples, folder, generate)
    key = _key(jobs, texts, keeps, precision)
    known = None if fresh else _known(store, key, named=curves is not None)
    measured = known is None
    if known is None:
        batch = batch_size or default_batch(place.type, jobs[0].plan.seq_len)
        with watch.stage("measure"):
            loss, costs = _measure(jobs, texts, place, precision, batch, progress)
        known = Curves(key, loss, costs)
        known.save(store)
    with watch.stage("allocate"):
        spent = [_spend(budget, jobs[0], known.curves, round_to) for budget in budgets]
    warnings = [*jobs[0].plan.warnings, *texts.warnings]
    for path, budget, each in zip(paths, budgets, spent, strict=True):
        path.write_text(_text(path, budget, each, texts, warnings), encoding="utf-8")
    return Planning(
        model=found.source,
        plans=[_planned(*each) for each in zip(paths, budgets, spent, strict=True)],
        curves=str(store),
        measured=measured,
        loss=known.loss,
        calibration=texts.fitted_to,
        held_out=texts.measured_on,
        dtype=_name(precision),
        seconds=watch.seconds,
        peak_bytes=watch.peak_bytes,
        warnings=warnings,
    )


def _check_settings(allocate: str, keeps: Sequence[float], round_to: int, samples: int) -> None:
    if allocate == "uniform":
        raise UserError(
            "allocate uniform needs no measurement: write `keep: 0.8` into a plan, and that is it"
        )
    if allocate != "sensitivity":
        raise UserError(f"allocation {allocate!r} is not built yet; {nearest(allocate, ['sensitivity'])}")
    if not keeps or any(not 0 < value < 1 for value in keeps) or len(set(keeps)) < len(keeps):
        raise UserError(f"--keeps {_listed(keeps)}: fractions to measure are distinct, above 0 and below 1")
    for name, value in (("--round", round_to), ("--held-out-samples", samples)):
        if value < 1:
            raise UserError(f"{name} {value} is too small; the smallest is 1")


def _check_files(files: Sequence[Path], plans: Sequence[Path]) -> None:
    for file in files:
        if not file.parent.is_dir():
            raise UserError(f"{file} cannot be written: there is no folder {file.parent}")
        if file.is_dir():
            raise UserError(f"{file} cannot be written: it is a folder")
    for plan in plans:
        if plan.exists() and _MADE not in plan.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{plan} is there and was not made by lrc plan; name another file with -o")


def _spend(budget: Budget, job: Job, curves: Sequence[Curve], round_to: int) -> Spent:
    return spend(budget, job, [replace(c, step=math.lcm(c.step, round_to)) for c in curves])


def _key(jobs: Sequence[Job], texts: Texts, keeps: Sequence[float], dtype: torch.dtype) -> dict[str, Any]:
    """All that measured curves hang on."""

    def ids(blocks: Tensor) -> str:
        return f"{blocks.shape[0]} x {blocks.shape[1]} {ids_sha256(blocks)}"

    settings, gradients = jobs[0].plan.plan.calibration, {}
    if any(reads_gradients(job.reader.architecture, job.plan) for job in jobs):
        chosen = gradient_blocks(texts.calibration.blocks, settings.gradient_samples, settings.seed)
        gradients = {"gradients": f"{ids(chosen)} seed {settings.seed}"}
    return {
        "model": jobs[0].reader.fingerprint,
        "base plan": plan_sha256([job.plan for job in jobs]),
        "keeps": sorted(keeps),
        "calibration": ids(texts.calibration.blocks),
        "held-out": ids(texts.held_blocks),
        **gradients,
        "dtype": _name(dtype),
        "versions": {"lrc": __version__, **{name: version(name) for name in _PACKAGES}},
    }


def _known(store: Path, key: dict[str, Any], *, named: bool) -> Curves | None:
    """The curves of an earlier run, if they are of the same; a file that the user names must be."""
    if not store.exists():
        return None
    known = load_curves(store)
    if not (differences := known.differences(key)):
        return known
    if named:
        raise UserError(
            f"{store} was measured with other settings: {'; '.join(differences)}. --fresh measures anew"
        )
    return None


def _measure(
    jobs: Sequence[Job],
    texts: Texts,
    place: torch.device,
    precision: torch.dtype,
    batch: int,
    progress: Progress | None,
) -> tuple[float, list[Curve]]:
    """The loss of the model as it is, and the curves."""
    job, plans = jobs[-1], [job.plan for job in jobs]
    needed = measuring_memory(job, precision, batch, len(texts.calibration.blocks), len(texts.held_blocks))
    if needed > (free := free_bytes(place)):
        raise UserError(
            f"measuring sensitivity holds the whole model on {place}: it needs about {needed:,} bytes, and {free:,} "
            "are free. Try a smaller --batch-size, --dtype bfloat16 or fewer calibration samples; `allocate: uniform`, "
            "which is what a plan with `keep` alone does, needs no measurement"
        )
    try:
        measuring = Sensitivity(
            ModelStream(job.reader, place, precision), texts.calibration.blocks, texts.held_blocks, batch
        )
        total = passes(job.reader.architecture, unmeasured(job.reader.architecture, plans))
        advance = progress("measure", total) if progress else lambda done: None
        return measuring.loss, measuring.curves(plans, advance)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"the GPU is out of memory; try --batch-size below {batch}, or fewer calibration samples"
        ) from error


def _text(path: Path, budget: Budget, spent: Spent, texts: Texts, warnings: Sequence[str]) -> str:
    """The plan as YAML, with what it is and rests on at its head."""
    job = spent.job
    header = [
        f"lrc compress {job.model.source} --plan {path}",
        "",
        f"{_MADE} for {budget} of {job.model.source}: keeps {job.plan.keep:.4f} of the decoder's weights.",
        f"Predicted: {spent.nats:+.4f} nats per token, perplexity times {_factor(spent.nats):.4g}.",
        f"Measured on {texts.measured_on}, each target alone,",
        f"with moments of {texts.fitted_to}.",
        *(f"Warning: {warning}" for warning in warnings),
    ]
    plan = job.plan.plan
    settings = plan.calibration.model_copy(update={"data": texts.calibration.data})
    return write_plan(plan.model_copy(update={"calibration": settings}), spent.layers, methods(), header)


def _planned(path: Path, budget: Budget, spent: Spent) -> Planned:
    job, after = spent.job, output_size(spent.job)
    targets, sizes = (
        job.reader.architecture.targets,
        [{a.target: a.size for a in la.assignments} for la in spent.layers],
    )
    return Planned(
        path=str(path),
        asked=str(budget),
        keep=job.plan.keep,
        kept=job.plan.kept,
        whole=job.plan.whole,
        bytes=after.bytes,
        kv_bytes_per_token=after.kv_bytes_per_token,
        nats=spent.nats,
        factor=_factor(spent.nats),
        strips=[
            Strip(name, target.full, [layer.get(name) for layer in sizes])
            for name, target in targets.items()
            if any(name in layer for layer in sizes)
        ],
    )


def _factor(nats: float) -> float:
    """What a rise of the loss multiplies perplexity by."""
    return math.exp(min(nats, 700.0))


def _listed(fractions: Sequence[float]) -> str:
    return ",".join(f"{fraction:g}" for fraction in fractions)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
