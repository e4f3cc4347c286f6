"""Makes plans for a budget: finds once what every size costs, then spends each budget where it saves most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lrc.allocation import ALLOCATORS
from lrc.allocation.budget import Budget, Spent, read_budgets
from lrc.allocation.curves import Curves, file_name, load_curves
from lrc.allocation.sizing import Limits, Measuring, Sizing, blank_curves, buy, default_samples
from lrc.allocation.spend import Curve
from lrc.calibration.draw import Texts
from lrc.calibration.enough import too_few
from lrc.checkpoint.durable import check_file, write_text, written
from lrc.errors import UserError
from lrc.estimate.sizes import output_size
from lrc.families import Target
from lrc.methods import methods
from lrc.plan.job import Job, templates
from lrc.plan.library import PlanLike, draft_of, read_draft
from lrc.plan.resolve import Draft
from lrc.plan.resolved import Assignment
from lrc.plan.schema import Components, Entry, Plan
from lrc.plan.write import write_plan
from lrc.records.planning import Planned, Planning, Strip, TableSize, cost_text, factor
from lrc.run.offload import States
from lrc.run.settings import Run
from lrc.text.spec import DataLike
from lrc.verbs.setup import Setup, set_up
from lrc.walk.needs import solver_of

_MADE = "Made by lrc plan"
_DEFAULT = Plan()
_FOR_CACHE = Plan(
    components=Components(qk=Entry.model_validate({"metric": "attention"}))
)  # narrower heads alone do


def make_plan(
    model: str | Path,
    *,
    keep: float | Sequence[float] | None = None,
    size: int | None = None,
    kv_cache: float | None = None,
    base: PlanLike | None = None,
    calib: DataLike | None = None,
    measuring: Measuring = Measuring(),
    limits: Limits = Limits(),
    out: str | Path = "plan.yaml",
    run: Run = Run(),
) -> Planning:
    """Write plans with the sizes of least cost that ``keep``, ``size`` or ``kv_cache`` allows.

    ``keep``: of the weights of the decoder and of what ``base`` names outside the layers without a size; of several,
    each gets a plan, NAME-KEEP.yaml. ``size``: bytes of all tensors. ``kv_cache``: of the cache; alone it leaves all
    but qk and ov whole, beside a keep it fixes what these take of that. ``base``: a plan without sizes in the layers,
    for methods, options and calibration (default: a3). ``measuring``: how costs are found. ``limits``: which sizes may
    be bought. Raises UserError for what the user can mend; no plan is written then.
    """
    out = Path(out)
    budgets = read_budgets(keep, size, kv_cache)
    default = _DEFAULT if kv_cache is None else _FOR_CACHE
    draft = draft_of(default, "the default base plan") if base is None else read_draft(base)
    name, keeps = measuring.allocation(draft.plan), measuring.fractions
    limits.check(name, keeps)
    paths = [out.with_name(f"{out.stem}-{b.keep:g}{out.suffix}") if budgets[1:] else out for b in budgets]
    _check_files(paths, None if measuring.curves is None else Path(measuring.curves))
    setup = set_up(model, run)
    jobs = templates(setup.model, setup.reader, draft, keeps)
    blank = blank_curves(name, jobs)
    for budget in budgets:  # one that cannot be met should be known now, not after the measurement
        buy(budget, jobs[0], blank, limits)
    texts = setup.texts(jobs[0], calib, measuring.held_out, measuring.samples or default_samples(name))
    sizing = _sizing(setup, name, jobs, keeps, texts, out.parent)
    setup.processes.agree(sizing.key)
    overruled, of_texts = _gives_way(draft, budgets), [*texts.warnings, *_too_few(sizing)]
    setup.warn([*overruled, *jobs[0].plan.warnings, *of_texts])
    store = _store(setup, sizing, measuring, out)
    known, measured = _curves(setup, sizing, blank, store, fresh=measuring.fresh)
    with setup.watch.stage("allocate"):
        spent = [buy(budget, jobs[0], known.curves, limits) for budget in budgets]
    for path, budget, each in zip(paths, budgets, spent, strict=True) if setup.processes.first else ():
        with written(path):
            write_text(path, _text(path, budget, name, known, each, texts, of_texts))
    return Planning(
        model=setup.model.source,
        allocation=name,
        unit=known.unit,
        plans=[_planned(*each, known.unit) for each in zip(paths, budgets, spent, strict=True)],
        curves=None if store is None else str(store),
        measured=measured,
        loss=known.loss,
        calibration=texts.fitted_to,
        held_out=texts.measured_on,
        dtype=setup.dtype_name,
        seconds=setup.watch.seconds,
        peak_bytes=setup.watch.peak_bytes,
        warnings=[*overruled, *dict.fromkeys(w for each in spent for w in each.job.plan.warnings), *of_texts],
    )


def _sizing(
    setup: Setup, name: str, jobs: Sequence[Job], keeps: Sequence[float], texts: Texts, scratch: Path
) -> Sizing:
    place = setup.offload(jobs[-1], len(setup.processes.mine(texts.calibration.blocks)))
    states, batch = States(place, scratch), setup.batch_size(jobs[0])
    return Sizing(name, jobs, keeps, texts, setup.device, setup.dtype, batch, states, setup.processes)


def _too_few(sizing: Sizing) -> list[str]:
    job, samples = sizing.jobs[0], len(sizing.texts.calibration.blocks)
    return too_few(job.reader.architecture, job.plan, samples, losses=ALLOCATORS[sizing.name].losses)


def _store(setup: Setup, sizing: Sizing, measuring: Measuring, out: Path) -> Path | None:
    """Return the file of what sizes cost; None for an allocation that measures nothing."""
    if ALLOCATORS[sizing.name].holds == "nothing":
        return None
    if measuring.curves is not None:
        return Path(measuring.curves)
    return out.with_name(file_name(setup.model.name, sizing.key))


def _curves(
    setup: Setup, sizing: Sizing, blank: Sequence[Curve], store: Path | None, *, fresh: bool
) -> tuple[Curves, bool]:
    """Return what sizes cost, and whether that was measured now: an earlier run's is used again unless ``fresh``."""
    first = setup.processes.first
    known = setup.processes.share(_known(store, sizing, blank) if store and first else None)
    if known is not None and not fresh:
        return known, False
    with setup.watch.stage("measure"):
        found = sizing.curves(setup.run.progress)
    if store and first:
        with written(store):
            found.save(store)
    return found, True


def _gives_way(draft: Draft, budgets: Sequence[Budget]) -> list[str]:
    """What to say of a keep that the base plan writes, where another is asked for."""
    plan, asked = draft.plan, " and ".join(str(budget) for budget in budgets)
    if "keep" not in plan.model_fields_set or [budget.keep for budget in budgets] == [plan.keep]:
        return []
    place = draft.document.place(("keep",))
    return [f"{place}: keep: the base plan's own gives way to what is asked for, {asked}"]


def _check_files(plans: Sequence[Path], curves: Path | None) -> None:
    for plan in plans:
        check_file("-o", plan)
    if curves is not None:
        check_file("--curves", curves)
    for plan in plans:
        if plan.exists() and _MADE not in plan.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{plan} is there and was not made by lrc plan; name another file with -o")


def _known(store: Path, sizing: Sizing, blank: Sequence[Curve]) -> Curves | None:
    """The curves of an earlier run; UserError where the file holds anything else, which nothing may overwrite."""
    if not store.exists():
        return None
    known = load_curves(store)
    if differences := known.differences(sizing.jobs[0].model.source, sizing.key):
        raise UserError(
            f"{store} was measured with other settings: {'; '.join(differences)}. Name another file with --curves, or "
            "leave it out"
        )
    if not known.fits(blank):
        raise UserError(
            f"{store} is damaged: its targets, sizes or costs are not those of its key; remove it"
        )
    return known


def _text(
    path: Path,
    budget: Budget,
    name: str,
    known: Curves,
    spent: Spent,
    texts: Texts,
    warnings: Sequence[str],
) -> str:
    """The plan as YAML, with what it is and rests on at its head."""
    job, basis, share = spent.job, [f"Allocation: {name}."], spent.job.plan.budget
    if known.loss is not None:
        basis.append(f"Measured on {texts.measured_on}, each target alone.")
    if ALLOCATORS[name].holds != "nothing":
        basis.append(f"Moments of {texts.fitted_to}.")
    header = [
        f"lrc compress {job.model.source} --plan {path}",
        "",
        f"{_MADE} for {budget} of {job.model.source}: keeps {share.keep:.4f} of {share.weights}.",
        *([f"Predicted: {cost}."] if (cost := cost_text(spent.cost, known.unit)) else []),
        *basis,
        *(f"Warning: {warning}" for warning in (*job.plan.warnings, *warnings)),
    ]
    plan = spent.plan.plan
    settings = plan.calibration.model_copy(update={"data": texts.calibration.data})
    told = replace(spent.plan, plan=plan.model_copy(update={"calibration": settings}))
    return write_plan(told, methods(), header)


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
        strips=[
            _strip(target, [layer.get(name) for layer in layers])
            for name, target in job.reader.architecture.targets.items()
            if any(name in layer for layer in layers)
        ],
        tables=[TableSize(a.target, a.size, a.kept, a.whole) for a in spent.plan.outer],
    )


def _strip(target: Target, layers: Sequence[Assignment | None]) -> Strip:
    """A target's sizes out of the largest that its methods have."""
    fulls = []
    for a in filter(None, layers):
        rule = solver_of(a).size
        full = rule.full(target, a.options)
        fulls.append((rule.weights(target, full, a.options), full))
    _, largest = max(fulls, key=lambda each: each[0])
    sizes = [a and (a.size if a.kept < a.whole else largest) for a in layers]
    return Strip(target.name, largest, sizes, [a.kept / a.whole if a else 1.0 for a in layers])


def _listed(fractions: Sequence[float]) -> str:
    return ",".join(f"{fraction:g}" for fraction in fractions)
