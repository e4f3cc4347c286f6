"""Makes plans for a budget: finds once what every size costs, then spends each budget where it saves most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lrc.allocation import ALLOCATORS
from lrc.allocation.budget import Budget, Spent, read_budgets
from lrc.allocation.curves import Curves, file_name, load_curves
from lrc.allocation.sizing import KEEPS, Limits, Progress, Sizing, blank_curves, buy, default_samples
from lrc.allocation.spend import Curve
from lrc.calibration.draw import Texts, draw_texts
from lrc.calibration.enough import too_few
from lrc.calibration.synthetic import synthesize
from lrc.checkpoint.durable import check_file, write_text, written
from lrc.checkpoint.reader import CheckpointReader
from lrc.errors import UserError, nearest
from lrc.estimate.room import choose_place, known_place
from lrc.estimate.sizes import output_size
from lrc.families import Target
from lrc.hub.names import resolve_model
from lrc.hub.tokenizer import load_tokenizer
from lrc.methods import methods
from lrc.plan.resolve import Draft, parse_plan
from lrc.plan.resolved import Assignment
from lrc.plan.schema import Plan
from lrc.plan.template import base_plan, templates
from lrc.plan.write import write_plan
from lrc.records.planning import Planned, Planning, Strip, TableSize, cost_text, factor
from lrc.run.offload import States
from lrc.run.processes import ALONE, Ranks
from lrc.run.settings import default_batch, find_device, find_dtype
from lrc.run.stopwatch import Stopwatch
from lrc.text.spec import DataLike
from lrc.walk.needs import solver_of

_MADE = "Made by lrc plan"


def make_plan(
    model: str | Path,
    *,
    keep: float | Sequence[float] | None = None,
    size: int | None = None,
    kv_cache: float | None = None,
    base: str | Path | None = None,
    allocate: str | None = None,
    held_out: str | None = None,
    held_out_samples: int | None = None,
    keeps: Sequence[float] | None = None,
    calib: DataLike | None = None,
    data_dir: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    states: str | None = None,
    curves: str | Path | None = None,
    round_to: int | None = None,
    floor: float | None = None,
    cap: float = 1.0,
    fresh: bool = False,
    out: str | Path = "plan.yaml",
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], object] | None = None,
    ranks: Ranks = ALONE,
) -> Planning:
    """Write plans with the sizes of least cost that ``keep``, ``size`` or ``kv_cache`` allows.

    ``keep``: of the weights of the decoder and of what ``base`` names outside the layers without a size; of several,
    each gets a plan, NAME-KEEP.yaml. ``size``: bytes of all tensors. ``kv_cache``: of the cache; alone it leaves all
    but qk and ov whole, beside a keep it fixes what these take of that. ``base``: a plan without sizes in the layers,
    for methods, options and calibration (default: a3). ``allocate``: what is spent where it saves most, one of
    ``lrc.allocation.ALLOCATORS`` (default: the base plan's if it names one, else sensitivity). ``keeps``:
    fractions of each target at which costs are found, by the allocations that cannot find all. ``held_out``: the text
    whose first ``held_out_samples`` blocks sensitivity is measured on (default: wikitext2:validation; for built-in
    models what calibration does not draw of builtin:train). Curves are kept in the file ``curves`` (default: beside
    ``out``, under the name that ``file_name`` gives to all that they hang on), to be used again unless
    ``fresh``. Sizes are multiples of ``round_to`` (default: of eight where a
    target is wide, at which matrix units are fast), and keep ``floor`` to ``cap`` of a target's weights (default: from
    the smallest whose cost is known, to all). The rest is as for ``lrc.compress``. Raises UserError for what the user
    can mend; no plan is written then.
    """
    out = Path(out)
    budgets, limits = read_budgets(keep, size, kv_cache), Limits(round_to, floor, cap)
    text, source = base_plan(None if base is None else str(base), for_cache=kv_cache is not None)
    draft = parse_plan(text, source)
    name = allocate or _allocation_of(draft.plan)
    _check_options(name, keeps, held_out, held_out_samples, curves)
    keeps = sorted(KEEPS if keeps is None else keeps)
    _check_limits(name, limits, keeps)
    paths = [out.with_name(f"{out.stem}-{b.keep:g}{out.suffix}") if budgets[1:] else out for b in budgets]
    _check_files(paths, None if curves is None else Path(curves))
    found = resolve_model(str(model), revision=revision, allow_pickle=allow_pickle)
    reader = CheckpointReader(found.path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    jobs = templates(found, reader, text, source, keeps)
    blank = blank_curves(name, jobs)
    for budget in budgets:  # one that cannot be met should be known now, not after the measurement
        buy(budget, jobs[0], blank, limits)
    place, asked = find_device(device, ranks), known_place(states)
    precision = find_dtype(dtype, place, reader.dtype)
    samples = held_out_samples or default_samples(name)
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
        ranks=ranks,
    )
    texts = draw_texts(jobs[0], tokenizer, calib, held_out, samples, folder, generate)
    batch = batch_size or default_batch(place.type, jobs[0].plan.seq_len)
    waits = choose_place(asked, jobs[-1], place, precision, batch, len(ranks.mine(texts.calibration.blocks)))
    sizing = Sizing(name, jobs, keeps, texts, place, precision, batch, States(waits, out.parent), ranks)
    ranks.agree(sizing.key)
    few = too_few(
        reader.architecture, jobs[0].plan, len(texts.calibration.blocks), losses=ALLOCATORS[name].losses
    )
    of_texts, overruled = [*texts.warnings, *few], _gives_way(draft, budgets)
    if warn:
        for warning in (*overruled, *jobs[0].plan.warnings, *of_texts):
            warn(warning)
    store = None
    if ALLOCATORS[name].holds != "nothing":
        store = out.with_name(file_name(found.name, sizing.key)) if curves is None else Path(curves)
    known = ranks.share(_known(store, sizing, blank) if store and ranks.first else None)
    measured = fresh or known is None
    if known is None or measured:
        with watch.stage("measure"):
            known = sizing.curves(progress)
        if store and ranks.first:
            with written(store):
                known.save(store)
    with watch.stage("allocate"):
        spent = [buy(budget, jobs[0], known.curves, limits) for budget in budgets]
    for path, budget, each in zip(paths, budgets, spent, strict=True) if ranks.first else ():
        with written(path):
            write_text(path, _text(path, budget, name, known, each, texts, of_texts))
    return Planning(
        model=found.source,
        allocation=name,
        unit=known.unit,
        plans=[_planned(*each, known.unit) for each in zip(paths, budgets, spent, strict=True)],
        curves=None if store is None else str(store),
        measured=measured,
        loss=known.loss,
        calibration=texts.fitted_to,
        held_out=texts.measured_on,
        dtype=str(precision).removeprefix("torch."),
        seconds=watch.seconds,
        peak_bytes=watch.peak_bytes,
        warnings=[*overruled, *dict.fromkeys(w for each in spent for w in each.job.plan.warnings), *of_texts],
    )


def _allocation_of(plan: Plan) -> str:
    """The allocation that a base plan names; sensitivity where it names none."""
    return plan.allocate if "allocate" in plan.model_fields_set else "sensitivity"


def _gives_way(draft: Draft, budgets: Sequence[Budget]) -> list[str]:
    """What to say of a keep that the base plan writes, where another is asked for."""
    plan, asked = draft.plan, " and ".join(str(budget) for budget in budgets)
    if "keep" not in plan.model_fields_set or [budget.keep for budget in budgets] == [plan.keep]:
        return []
    place = f"{draft.document.source}:{draft.document.line(('keep',))}"
    return [f"{place}: keep: the base plan's own gives way to what is asked for, {asked}"]


def _check_options(
    name: str,
    keeps: Sequence[float] | None,
    held_out: str | None,
    samples: int | None,
    curves: str | Path | None,
) -> None:
    """Refuse an unknown allocation, and options that it has no use for."""
    if name not in ALLOCATORS:
        raise UserError(f"unknown allocation {name!r}; {nearest(name, ALLOCATORS)}")
    allocator = ALLOCATORS[name]
    for option, given, used, why in (
        ("--keeps", keeps, allocator.keeps, "knows the cost of every size"),
        ("--held-out", held_out, allocator.held_out, "reads no held-out text"),
        ("--held-out-samples", samples, allocator.held_out, "reads no held-out text"),
        ("--curves", curves, allocator.holds != "nothing", "measures nothing"),
    ):
        if given is not None and not used:
            raise UserError(f"{option} has no effect: allocation {name} {why}; leave it out")
    if keeps is not None and (
        not keeps or any(not 0 < value < 1 for value in keeps) or len(set(keeps)) < len(keeps)
    ):
        raise UserError(f"--keeps {_listed(keeps)}: fractions to measure are distinct, above 0 and below 1")
    if samples is not None and samples < 1:
        raise UserError(f"--held-out-samples {samples} is too small; the smallest is 1")


def _check_limits(name: str, limits: Limits, keeps: Sequence[float]) -> None:
    if limits.round_to is not None and limits.round_to < 1:
        raise UserError(f"--round {limits.round_to} is too small; the smallest is 1")
    for option, value in (("--floor", limits.floor), ("--cap", limits.cap)):
        if value is not None and not 0 < value <= 1:
            raise UserError(
                f"{option} {value:g} is outside (0, 1]; it is a fraction of each target's weights"
            )
    if limits.floor is None:
        return
    if limits.floor > limits.cap:
        raise UserError(f"--floor {limits.floor:g} is above --cap {limits.cap:g}")
    if ALLOCATORS[name].keeps and limits.floor < keeps[0]:
        raise UserError(
            f"--floor {limits.floor:g} is below the smallest fraction measured; put it into --keeps {_listed(keeps)}"
        )


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
