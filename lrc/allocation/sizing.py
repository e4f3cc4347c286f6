"""Measure what sizes cost, cache it in a file and spend budgets, for ``lrc plan`` and for plans with ``allocate:``."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lrc.allocation import ALLOCATORS
from lrc.allocation.budget import Budget, Spent, shortfalls, spend
from lrc.allocation.contract import Setting
from lrc.allocation.spend import Choice, Curve, Offer
from lrc.calibration.draw import blocks_key, digest, gradients_key
from lrc.checkpoint.durable import write_file
from lrc.errors import UserError, nearest
from lrc.estimate.memory import HELD_OUT_SAMPLES, measuring_memory
from lrc.estimate.room import free_bytes, memory_advice
from lrc.families import Target
from lrc.methods.sizes import Options, SizeRule, SizeValue
from lrc.plan.document import dotted
from lrc.plan.job import Job, jobs_at_keeps
from lrc.plan.resolved import ResolvedPlan
from lrc.plan.schema import Plan
from lrc.run.settings import Progress
from lrc.run.versions import versions
from lrc.text.mixture import DataLike
from lrc.walk.needs import reads_gradients, solver_of

FORMAT = 7  # of files of curves
KEEPS = (0.95, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2)
_EXACT = 1e-9  # rounding error of products such as 0.7 * 10


def check_keeps(keeps: Sequence[float]) -> list[float]:
    """Return kept fractions, ascending. Raises UserError unless they are distinct and between 0 and 1."""
    if not keeps or any(not 0 < keep < 1 for keep in keeps) or len(set(keeps)) < len(keeps):
        raise UserError(f"--keeps {_listed(keeps)}: fractions are distinct, above 0 and below 1")
    return sorted(keeps)


@dataclass(frozen=True)
class Limits:
    """Sizes that a budget may buy: multiples of ``round_to`` that keep ``floor`` to ``cap`` of a target's weights.

    Defaults: sizes that the method calls fast, from the smallest with a known cost. At a cap of 1 targets may stay
    whole.
    """

    round_to: int | None = None
    floor: float | None = None
    cap: float = 1.0

    def check(self, name: str, keeps: Sequence[float]) -> None:
        """Raise UserError for limits out of range, or a floor below the smallest of the measured ``keeps``."""
        if self.round_to is not None and self.round_to < 1:
            raise UserError(f"--round {self.round_to} is too small; the smallest is 1")
        for option, value in (("--floor", self.floor), ("--cap", self.cap)):
            if value is not None and not 0 < value <= 1:
                raise UserError(
                    f"{option} {value:g} is outside (0, 1]; it is a fraction of each target's weights"
                )
        if self.floor is None:
            return
        if self.floor > self.cap:
            raise UserError(f"--floor {self.floor:g} is above --cap {self.cap:g}")
        if ALLOCATORS[name].keeps and self.floor < keeps[0]:
            raise UserError(
                f"--floor {self.floor:g} is below the smallest fraction measured; put it into --keeps {_listed(keeps)}"
            )

    def on(self, curve: Curve, rule: SizeRule, target: Target, options: Options, each: float) -> Offer:
        """Return the sizes of a curve that a budget may buy, of weights that take ``each`` bytes.

        Raises UserError if the limits allow none.
        """

        def choice(size: SizeValue) -> Choice:
            weights = rule.weights(target, size, options)
            return Choice(size, weights, rule.bytes(target, size, options, each), rule.inner(target, size))

        whole = Choice(curve.full, curve.whole, round(curve.whole * each), target.full)
        least = max(curve.weights[0], ((self.floor or 0) - _EXACT) * curve.whole)
        smaller = [choice(size) for size in rule.choices(target, options, self.round_to)]
        every = [*(each for each in smaller if each.weights >= least), whole]
        found = [each for each in every if each.weights <= (self.cap + _EXACT) * curve.whole]
        if not found:
            kept = every[0].weights / curve.whole
            raise UserError(f"--cap {self.cap:g} leaves {curve.name} no size; its smallest keeps {kept:.4g}")
        return Offer(curve, tuple(found), whole)


@dataclass(frozen=True)
class Measuring:
    """How ``lrc plan`` finds what sizes cost.

    ``allocate``: one of ``lrc.allocation.ALLOCATORS`` (default: the base plan's, else sensitivity). ``keeps``:
    fractions of each target to measure. ``held_out``: texts of which sensitivity reads the first ``held_out_samples``
    blocks (default: the validation splits of general where calibration is on general, else wikitext2:validation; for
    built-in models the part of builtin:train outside the calibration text).
    ``curves``: the file that caches the costs (default: beside the plan, named by ``lrc.allocation.sizing.file_name``).
    ``fresh``: ignore the cached costs.
    """

    allocate: str | None = None
    keeps: Sequence[float] | None = None
    held_out: DataLike | None = None
    held_out_samples: int | None = None
    curves: str | Path | None = None
    fresh: bool = False

    def allocation(self, base: Plan) -> str:
        """Return the allocation's name. Raises UserError for an unknown one, and for options without effect."""
        named = base.allocate if "allocate" in base.model_fields_set else "sensitivity"
        name = self.allocate or named
        if name not in ALLOCATORS:
            raise UserError(f"unknown allocation {name!r}; {nearest(name, ALLOCATORS)}")
        allocator = ALLOCATORS[name]
        for option, given, used, why in (
            ("--keeps", self.keeps, allocator.keeps, "knows the cost of every size"),
            ("--held-out", self.held_out, allocator.held_out, "reads no held-out text"),
            ("--held-out-samples", self.held_out_samples, allocator.held_out, "reads no held-out text"),
            ("--curves", self.curves, allocator.holds != "nothing", "measures nothing"),
        ):
            if given is not None and not used:
                raise UserError(f"{option} has no effect: allocation {name} {why}; leave it out")
        if self.held_out_samples is not None and self.held_out_samples < 1:
            raise UserError(f"--held-out-samples {self.held_out_samples} is too small; the smallest is 1")
        return name

    @property
    def fractions(self) -> list[float]:
        """Fractions to measure, ascending. Raises UserError as ``check_keeps`` does."""
        return check_keeps(KEEPS if self.keeps is None else self.keeps)


@dataclass(frozen=True)
class Curves:
    """Curves of a model with costs in ``unit``; ``key`` holds everything that determines them.

    ``model``: the name that the user gave. ``loss``: the original model's nats per held-out token, if measured.
    """

    model: str
    key: dict[str, Any]
    unit: str
    loss: float | None
    curves: list[Curve]

    def as_dict(self) -> dict[str, Any]:
        """Return the curves as JSON values."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        write_file(path, json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n")

    def differences(self, model: str, key: Mapping[str, Any]) -> list[str]:
        """Return the fields in which another model's ``key`` differs, each with both values."""
        there, here = (
            {**k, "model": f"{m} {k.get('model')}"} for m, k in ((self.model, self.key), (model, key))
        )
        names = [name for name in {**self.key, **key} if self.key.get(name) != key.get(name)]
        texts = [f"{name} (there {there.get(name)}, here {here.get(name)})" for name in names]
        return [re.sub(r"([0-9a-f]{8})[0-9a-f]{56}", r"\1…", text) for text in texts]

    def fits(self, blank: Sequence[Curve]) -> bool:
        """Return whether these are the ``blank`` curves with a finite cost at every size."""
        bare, expected = ([replace(curve, costs=()) for curve in curves] for curves in (self.curves, blank))
        return bare == expected and all(
            len(curve.costs) == len(curve.sizes) and all(map(math.isfinite, curve.costs))
            for curve in self.curves
        )


_CURVES = TypeAdapter(Curves)


def file_name(model: str, key: Mapping[str, Any]) -> str:
    """Return the file name of curves: model, allocation and a hash of the key."""
    return f"{model}.{key['allocation']}.{digest(key)}.curves.json"


def load_curves(path: Path) -> Curves:
    """Read a file of ``Curves.save``. Raises UserError for any other file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or "format" not in found:
            raise ValueError("no mapping with a format")
        if found["format"] != FORMAT:
            raise UserError(
                f"{path} has format {found['format']!r}, this version of lrc reads {FORMAT}; remove it, or name "
                "another with --curves"
            )
        return as_curves(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = f"{dotted(first['loc'])}: {first['msg']}"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise UserError(
        f"{path} holds no curves of lrc plan ({reason}); remove it, or name another with --curves"
    )


def as_curves(values: Mapping[str, Any]) -> Curves:
    """Return the curves of ``Curves.as_dict``. Raises pydantic's ValidationError for other values."""
    return _CURVES.validate_json(json.dumps(values, allow_nan=False), strict=True)


def plan_sha256(plans: Sequence[ResolvedPlan]) -> str:
    """Return a hash of the targets, methods and options in and outside the layers, ignoring sizes."""
    found = {
        (
            -1 if index is None else index,
            a.target,
            a.method,
            json.dumps(a.options, sort_keys=True, allow_nan=False),
        )
        for plan in plans
        for index in (None, *range(len(plan.layers)))
        for a in plan.unsized(index)
    }
    return hashlib.sha256(json.dumps(sorted(found), allow_nan=False).encode()).hexdigest()


@dataclass(frozen=True)
class Sizing:
    """An allocation by name with its inputs; ``jobs`` hold the base plan at each of ``keeps``, ascending."""

    name: str
    jobs: Sequence[Job]
    keeps: Sequence[float]
    setting: Setting

    @property
    def key(self) -> dict[str, Any]:
        """Everything that determines the curves, as JSON values."""
        allocator, setting, plan = ALLOCATORS[self.name], self.setting, self.setting.plans[0]
        texts, blocks = setting.texts, setting.texts.calibration.blocks
        key: dict[str, Any] = {
            "allocation": self.name,
            "model": setting.reader.fingerprint,
            "base plan": plan_sha256(setting.plans),
        }
        if allocator.keeps:
            key["keeps"] = list(self.keeps)
        if allocator.holds != "nothing":
            key |= {"calibration": blocks_key(blocks), "dtype": str(setting.dtype).removeprefix("torch.")}
            key["first token"] = plan.first_token
            architecture = setting.reader.architecture
            if allocator.losses or any(reads_gradients(architecture, each) for each in setting.plans):
                key["gradients"] = gradients_key(blocks, plan.plan.calibration)
        if texts.held_blocks is not None:
            key["held-out"] = blocks_key(texts.held_blocks)
        return key | {"versions": versions("torch", "transformers")}

    def curves(self, progress: Progress | None) -> Curves:
        """Measure what sizes cost. Raises UserError if the device lacks memory."""
        allocator, setting = ALLOCATORS[self.name], replace(self.setting, losses=ALLOCATORS[self.name].losses)
        if allocator.holds == "model":
            self._check_memory()
        steps = allocator.steps(setting.reader.architecture, blank_curves(self.name, self.jobs))
        measures = allocator.holds != "nothing"
        advance = progress("measure sizes", steps) if progress and measures else lambda done: None
        with memory_advice(f"--batch-size below {setting.batch_size}, or fewer calibration samples"):
            curves, loss = allocator.curves(setting, advance)
        if wrong := next((curve for curve in curves if not all(map(math.isfinite, curve.costs))), None):
            raise UserError(
                f"{wrong.name}: a cost measured by {self.name} is NaN or inf; try --dtype float32"
            )
        return Curves(self.jobs[0].model.source, self.key, allocator.unit, loss, curves)

    def _check_memory(self) -> None:
        """Raise UserError if the whole model and the measurement do not fit on the device."""
        setting, held = self.setting, self.setting.texts.held_blocks
        counts = len(setting.texts.calibration.blocks), 0 if held is None else len(held)
        place = setting.states.place
        needed = measuring_memory(self.jobs[-1], setting.dtype, setting.batch_size, *counts, place)
        if needed > (free := free_bytes(setting.device)):
            others = "energy, which holds" if setting.plans[0].shared else "fisher, or by energy, which hold"
            raise UserError(
                f"measuring {self.name} holds the whole model on {setting.device}: it needs about {needed:,} bytes, "
                f"and {free:,} are free. Allocate by {others} one layer at a time; or try a smaller --batch-size, "
                "--dtype bfloat16, --offload host or fewer calibration samples"
            )


def blank_curves(name: str, jobs: Sequence[Job]) -> list[Curve]:
    """Return an allocation's curves without costs. Raises UserError if it does not support the plan."""
    return ALLOCATORS[name].blank(jobs[0].reader.architecture, [job.plan for job in jobs])


def buy(budget: Budget, job: Job, curves: Sequence[Curve], limits: Limits) -> Spent:
    """Return the sizes of least cost within a budget and limits; ``job`` has the plan at its smallest sizes.

    Adds a warning to the plan if over 0.2 % of the budget stays unspent. Raises UserError naming the smallest or
    largest possible budget if this one cannot be met.
    """
    reader, offers = job.reader, list[Offer]()
    targets = reader.architecture.targets | reader.architecture.outer
    for curve in curves:
        (one,) = (a for a in job.plan.unsized(curve.layer) if a.target == curve.target)
        target = targets[one.target]
        each = reader.weight_bytes(target, curve.layer)
        offers.append(limits.on(curve, solver_of(one).size, target, one.options, each))
    spent = spend(budget, job, offers)
    short = shortfalls(budget, spent)
    if not short:
        return spent
    options = (
        ("--round", limits.round_to, (limits.round_to or 1) > 1),
        ("--cap", limits.cap, limits.cap < 1),
        ("--kv-cache", budget.kv_cache, budget.kv_cache is not None),
    )
    excluding = " ".join(f"{option} {value:g}" for option, value, excludes in options if excludes)
    within = f"with {excluding} " if excluding else ""
    warning = f"the plan has {', '.join(short)}: {within}no larger size of any target fits the budget"
    plan = replace(spent.job.plan, warnings=(*spent.job.plan.warnings, warning))
    return replace(spent, job=replace(spent.job, plan=plan))


def default_samples(name: str) -> int | None:
    """Return an allocation's default number of held-out blocks; None if it reads none."""
    return HELD_OUT_SAMPLES if ALLOCATORS[name].held_out else None


def jobs_to_measure(job: Job) -> list[Job]:
    """Return a job at each of ``KEEPS``, ascending, for its plan's allocation; none for uniform sizes.

    Raises UserError if the allocation does not support the plan, or the plan's keep cannot be met.
    """
    name = job.plan.plan.allocate
    if name == "uniform":
        return []
    jobs = jobs_at_keeps(job.model, job.reader, job.draft, sorted(KEEPS), job.plan.plan.calibration.data)
    sized_by(job, jobs[0], blank_curves(name, jobs))
    return jobs


def sized_by(job: Job, smallest: Job, curves: Sequence[Curve]) -> tuple[Job, float]:
    """Return the job with the sizes that its plan's keep buys, and their cost.

    ``smallest`` has the same plan at its smallest sizes.
    """
    keep = job.plan.plan.keep
    assert isinstance(keep, float), "a plan that asks for an allocation has one keep"
    spent = buy(Budget(keep=keep), smallest, curves, Limits())
    return replace(job, plan=replace(spent.job.plan, plan=job.plan.plan)), spent.cost


def _listed(fractions: Sequence[float]) -> str:
    return ",".join(f"{fraction:g}" for fraction in fractions)
