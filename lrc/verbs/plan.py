"""Write plans for a budget: find the cost of each size, then choose the sizes of least cost. ``lrc plan`` calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lrc.allocation import ALLOCATORS
from lrc.allocation.budget import Budget, Spent, read_budgets
from lrc.allocation.sizing import (
    Curves,
    Limits,
    Measuring,
    Sizing,
    blank_curves,
    buy,
    default_samples,
    file_name,
    load_curves,
)
from lrc.allocation.spend import Curve
from lrc.calibration.draw import Texts, too_few
from lrc.checkpoint.durable import check_file, write_file
from lrc.errors import UserError
from lrc.estimate.sizes import output_size
from lrc.families import Target
from lrc.methods import methods
from lrc.plan.job import jobs_at_keeps
from lrc.plan.library import PlanLike, draft_of, read_draft, write_plan
from lrc.plan.resolved import Assignment
from lrc.plan.schema import Components, Entry, Plan
from lrc.records.planning import LayerSizes, Planned, Planning, TableSize, cost_text, factor
from lrc.run.offload import States
from lrc.run.settings import Run
from lrc.text.mixture import DataLike
from lrc.verbs.setup import Setup, set_up
from lrc.walk.needs import solver_of

_MADE = "Made by lrc plan"
_DEFAULT = Plan()
# Only narrower heads shrink a cache; a3 makes those of keys narrower with the metric ``attention``, where they can be.
_FOR_CACHE = Plan(components=Components(qk=Entry.model_validate({"metric": "attention"})))


def make_plan(
    model: str | Path,
    *,
    keep: float | Sequence[float] | None = None,
    bytes: int | None = None,
    kv_cache: float | None = None,
    base: PlanLike | None = None,
    calib: DataLike | None = None,
    measuring: Measuring = Measuring(),
    limits: Limits = Limits(),
    out: str | Path = "plan.yaml",
    run: Run = Run(),
) -> Planning:
    """Write plans with the sizes of least cost that ``keep``, ``bytes`` or ``kv_cache`` allows.

    ``keep``: fraction of the weights of the decoder, and of tables that ``base`` names without a size; each of several
    fractions gets a plan, NAME-KEEP.yaml. ``bytes``: of all tensors. ``kv_cache``: fraction of the cache, which
    alone decides the sizes of qk and ov; without ``keep`` all else stays whole. ``base``: a plan without sizes in the
    layers, for methods, options and calibration (default: a3). ``measuring``: how costs are found. ``limits``: which
    sizes are allowed. Raises UserError for every mistake that the user can fix; no plan is written then.
    """
    out = Path(out)
    budgets = read_budgets(keep, bytes, kv_cache)
    setup = set_up(model, run)
    narrow = kv_cache is not None and "qk" in setup.reader.architecture.targets
    default = _FOR_CACHE if narrow else _DEFAULT
    draft = draft_of(default, "the default base plan") if base is None else read_draft(base)
    name, keeps = measuring.allocation(draft.plan), measuring.fractions
    limits.check(name, keeps)
    paths = [out.with_name(f"{out.stem}-{b.keep:g}{out.suffix}") if budgets[1:] else out for b in budgets]
    _check_files(paths, measuring.curves)
    jobs = jobs_at_keeps(setup.model, setup.reader, draft, keeps, calib)
    blank = blank_curves(name, jobs)
    for budget in budgets:  # before the measurement, as some budgets cannot be met
        buy(budget, jobs[0], blank, limits)
    texts = setup.texts(jobs[0], measuring.held_out, measuring.held_out_samples or default_samples(name))
    samples = len(texts.calibration.blocks)
    states = States(setup.offload(jobs[-1], samples), out.parent)
    sizing = Sizing(name, jobs, keeps, setup.setting(jobs, texts, states))
    setup.processes.agree(sizing.key)
    overridden = []
    if "keep" in draft.plan.model_fields_set and [budget.keep for budget in budgets] != [draft.plan.keep]:
        asked, where = " and ".join(map(str, budgets)), draft.document.place(("keep",))
        overridden.append(f"{where}: keep: is replaced by what is asked for, {asked}")
    few = too_few(setup.reader.architecture, jobs[0].plan, samples, losses=ALLOCATORS[name].losses)
    of_texts = [*texts.warnings, *few]
    setup.warn([*overridden, *jobs[0].plan.warnings, *of_texts])
    store = None
    if ALLOCATORS[name].holds != "nothing":
        store = Path(measuring.curves or out.with_name(file_name(setup.model.name, sizing.key)))
    known, measured = _curves(setup, sizing, blank, store, fresh=measuring.fresh)
    with setup.watch.stage("allocate"):
        spent = [buy(budget, jobs[0], known.curves, limits) for budget in budgets]
    of_plans = dict.fromkeys(warning for each in spent for warning in each.job.plan.warnings)
    warnings = [*overridden, *of_plans, *of_texts]
    setup.warn(warnings)
    plans = list(zip(paths, budgets, spent, strict=True))
    for path, budget, each in plans if setup.processes.first else ():
        write_file(path, _text(path, budget, name, known, each, texts, of_texts))
    return Planning(
        model=setup.model.source,
        allocation=name,
        unit=known.unit,
        plans=[_planned(*each, known.unit) for each in plans],
        curves=None if store is None else str(store),
        measured=measured,
        loss=known.loss,
        calibration=texts.fitted_to,
        held_out=texts.measured_on,
        dtype=setup.dtype_name,
        seconds=setup.watch.seconds,
        peak_bytes=setup.watch.peak_bytes,
        warnings=warnings,
    )


def _check_files(plans: Sequence[Path], curves: str | Path | None) -> None:
    """Raise UserError for a file that cannot be written, or that another program wrote."""
    for plan in plans:
        check_file("-o", plan)
    if curves is not None:
        check_file("--curves", Path(curves))
    for plan in plans:
        if plan.exists() and _MADE not in plan.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{plan} exists and was not made by lrc plan; name another file with -o")


def _curves(
    setup: Setup, sizing: Sizing, blank: Sequence[Curve], store: Path | None, *, fresh: bool
) -> tuple[Curves, bool]:
    """Return what sizes cost, cached in ``store``, and whether this run measured it."""
    first = setup.processes.first
    known = setup.processes.share(_cached(store, sizing, blank) if store and first else None)
    if known is not None and not fresh:
        return known, False
    with setup.watch.stage("measure"):
        found = sizing.curves(setup.run.progress)
    if store and first:
        found.save(store)
    return found, True


def _cached(store: Path, sizing: Sizing, blank: Sequence[Curve]) -> Curves | None:
    """Return the curves of an earlier run. Raises UserError for any other file, which must not be overwritten."""
    if not store.exists():
        return None
    known = load_curves(store)
    if differences := known.differences(sizing.jobs[0].model.source, sizing.key):
        settings = "; ".join(differences)
        raise UserError(f"{store} was measured with other settings: {settings}. Use another --curves file")
    if not known.fits(blank):
        raise UserError(f"{store} is damaged: its targets, sizes or costs do not fit its key; remove it")
    return known


def _text(
    path: Path, budget: Budget, name: str, known: Curves, spent: Spent, texts: Texts, warnings: Sequence[str]
) -> str:
    """Return the plan as YAML below a comment that says how it was made."""
    job, plan, share = spent.job, spent.plan.plan, spent.job.plan.budget
    cost = cost_text(spent.cost, known.unit)
    header = [
        f"lrc compress {job.model.source} --plan {path}",
        "",
        f"{_MADE} for {budget} of {job.model.source}: keeps {share.keep:.4f} of {share.weights}.",
        *([f"Predicted: {cost}."] if cost else []),
        f"Allocation: {name}.",
        *([f"Measured on {texts.measured_on}, each target alone."] if known.loss is not None else []),
        *([f"Moments of {texts.fitted_to}."] if ALLOCATORS[name].holds != "nothing" else []),
        *(f"Warning: {warning}" for warning in (*job.plan.warnings, *warnings)),
    ]
    calibration = plan.calibration.model_copy(update={"data": texts.calibration.data})
    resolved = replace(spent.plan, plan=plan.model_copy(update={"calibration": calibration}))
    return write_plan(resolved, methods(), header)


def _planned(path: Path, budget: Budget, spent: Spent, unit: str) -> Planned:
    job, share, after = spent.job, spent.job.plan.budget, output_size(spent.job)
    layers = [{a.target: a for a in layer.assignments} for layer in spent.plan.layers]
    return Planned(
        path=str(path),
        asked=str(budget),
        of=share.of,
        keep=share.keep,
        kept=share.kept,
        whole=share.whole,
        bytes=after.bytes,
        kv_bytes_per_token=after.kv_bytes_per_token,
        cost=spent.cost,
        factor=factor(spent.cost, unit),
        targets=[
            _layer_sizes(target, [layer.get(name) for layer in layers])
            for name, target in job.reader.architecture.targets.items()
            if any(name in layer for layer in layers)
        ],
        tables=[TableSize(a.target, a.size, a.kept, a.whole) for a in spent.plan.outer],
    )


def _layer_sizes(target: Target, layers: Sequence[Assignment | None]) -> LayerSizes:
    """Return a target's sizes by layer, and the largest size that its methods have."""
    fulls = []
    for a in filter(None, layers):
        rule = solver_of(a).size
        full = rule.full(target, a.options)
        fulls.append((rule.weights(target, full, a.options), full))
    _, largest = max(fulls, key=lambda each: each[0])
    sizes = [a and (a.size if a.kept < a.whole else largest) for a in layers]
    return LayerSizes(target.name, largest, sizes, [a.kept / a.whole if a else 1.0 for a in layers])
