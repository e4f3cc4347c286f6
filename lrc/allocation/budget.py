"""Budgets as people state them (a kept fraction, bytes, a cache), spent on curves of what sizes cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lrc.allocation.spend import Allocation, Curve, allocate
from lrc.errors import UserError
from lrc.estimate.sizes import output_size
from lrc.plan.job import Job
from lrc.plan.resolved import Assignment, ResolvedPlan

_SMALLER = "allow smaller sizes (lrc plan's --keeps, --floor, --round), or shrink more of the model"
_SHORT = 0.002  # of what was asked may stay unspent


@dataclass(frozen=True)
class Budget:
    """What may be kept: ``keep`` of the weights of the decoder and of tables without sizes of their own, or ``size``
    bytes of the checkpoint's tensors; alone or beside a keep, ``kv_cache`` of the cache.
    """

    keep: float | None = None
    size: int | None = None
    kv_cache: float | None = None

    def __str__(self) -> str:
        named = (("keep", self.keep), ("bytes", self.size), ("KV cache", self.kv_cache))
        return ", ".join(f"{name} {value:,}" for name, value in named if value is not None)


@dataclass(frozen=True)
class Spent:
    """A job with the sizes that a budget bought, and what they add up to in the unit of the curves.

    ``plan`` is the job's with what stays whole as well, at its full size.
    """

    job: Job
    plan: ResolvedPlan
    cost: float


def read_budgets(
    keep: float | Sequence[float] | None, size: int | None, kv_cache: float | None
) -> list[Budget]:
    """One budget for each keep, or one in all. Raises UserError for fractions outside (0, 1] and for contradictions."""
    keeps = [] if keep is None else [keep] if isinstance(keep, int | float) else list(keep)
    if size is not None and (keeps or kv_cache is not None):
        raise UserError("--bytes stands alone; leave out --keep and --kv-cache")
    if size is None and not keeps and kv_cache is None:
        raise UserError("say what to keep: --keep 0.8, --bytes 4G or --kv-cache 0.5")
    for name, value in [*(("--keep", value) for value in keeps), ("--kv-cache", kv_cache)]:
        if value is not None and not 0 < value <= 1:
            raise UserError(f"{name} {value:g} is outside (0, 1]; it is a fraction of the original")
    if len({f"{value:g}" for value in keeps}) < len(keeps):  # as their plans are called
        raise UserError("--keep names a fraction twice")
    return [Budget(value, size, kv_cache) for value in keeps or [None]]


def spend(budget: Budget, job: Job, curves: Sequence[Curve]) -> Spent:
    """Sizes of least cost within a budget; ``job``: the measured plan at any one of its sizes.

    Raises UserError with the smallest or largest budget that can be met where this one cannot.
    """
    if not curves:
        raise UserError(
            f"there is nothing to allocate: {job.draft.name} leaves all whole at every measured size"
        )
    if budget.size is not None:
        return _spend_bytes(budget.size, job, curves)
    kept = [curve for curve in curves if curve.target in ("qk", "ov")] if budget.kv_cache is not None else []
    rest = [curve for curve in curves if curve not in kept]
    spent = (
        _spend_cache(budget.kv_cache, job, kept) if budget.kv_cache is not None else Allocation((), 0, 0.0)
    )
    whole = job.plan.budget.whole
    fixed = whole - sum(curve.whole for curve in curves) + spent.weights
    if budget.keep is None:
        bought = Allocation(tuple(c.full for c in rest), sum(c.whole for c in rest), 0.0)
    else:
        bought = _spend_weights(budget.keep, whole, fixed, rest)
    return _sized(job, [*kept, *rest], (*spent.sizes, *bought.sizes), spent.cost + bought.cost)


def shortfalls(budget: Budget, spent: Spent) -> list[str]:
    """What of a budget is left unspent, in words, each part of which more than 0.2 % is; nothing where all is whole."""
    plan = spent.job.plan
    if plan.budget.kept == plan.budget.whole:
        return []
    parts = (
        ("keep", budget.keep, plan.budget.keep),
        ("KV cache", budget.kv_cache, _cache_share(spent)),
        ("bytes", budget.size, output_size(spent.job).bytes),
    )
    return [
        f"{name} {asked:,} comes to {round(kept, 4):,}"
        for name, asked, kept in parts
        if asked is not None and kept < asked * (1 - _SHORT)
    ]


def _cache_share(spent: Spent) -> float:
    """Width of the KV cache over the original's."""
    heads = spent.job.reader.architecture
    narrowed = [a for layer in spent.job.plan.layers for a in layer.assignments if a.target in ("qk", "ov")]
    return 1 - sum(1 - a.size / heads.head_dim for a in narrowed) / (2 * heads.layers)


def _spend_weights(keep: float, whole: int, fixed: int, curves: Sequence[Curve]) -> Allocation:
    least = fixed + sum(curve.smallest for curve in curves)
    limit = _limit(f"a keep of {keep:g}", keep, whole, least, fixed + sum(curve.largest for curve in curves))
    return allocate(curves, limit - fixed)


def _spend_cache(fraction: float, job: Job, curves: Sequence[Curve]) -> Allocation:
    """Spend the cache's width on qk and ov; the weights returned are still weights."""
    heads = job.reader.architecture
    if not curves:
        raise UserError(
            "the KV cache shrinks with the components qk and ov; the base plan has neither to shrink"
        )
    whole = 2 * heads.head_dim * heads.layers
    widths = [replace(curve, unit=1, whole=curve.full) for curve in curves]
    fixed = whole - sum(curve.full for curve in curves)
    least = fixed + sum(curve.smallest for curve in widths)
    most = fixed + sum(curve.largest for curve in widths)
    wide = "" if any(curve.target == "qk" for curve in curves) else " without narrower keys (components: qk)"
    limit = _limit(f"a KV cache of {fraction:g}{wide}", fraction, whole, least, most)
    found = allocate(widths, limit - fixed)
    return replace(found, weights=sum(c.kept(size) for c, size in zip(curves, found.sizes, strict=True)))


def _limit(asked: str, fraction: float, whole: int, least: int, most: int) -> int:
    """What a fraction of ``whole`` comes to, if sizes that keep ``least`` to ``most`` can meet it."""
    limit = math.floor(fraction * whole + 1e-6)  # 0.7 * 10 is a little less than 7
    if limit < least:
        smallest = math.ceil(least / whole * 1e4) / 1e4
        raise UserError(f"{asked} cannot be met; the smallest that can is {smallest:g}: {_SMALLER}")
    if most < limit * (1 - _SHORT):
        largest = math.floor(most / whole * 1e4) / 1e4
        raise UserError(f"{asked} cannot be met; the largest that can is {largest:g}: raise --cap")
    return limit


def _spend_bytes(limit: int, job: Job, curves: Sequence[Curve]) -> Spent:
    """Spend bytes of the checkpoint's tensors; biases and kept columns are counted afterwards."""
    whole = output_size(_sized(job, curves, [curve.full for curve in curves], 0.0).job).bytes
    if limit > whole:
        raise UserError(f"{limit:,} bytes are more than the whole model, which has {whole:,}: ask for fewer")
    lowest, budget = (sum(c.smallest for c in curves), sum(c.whole for c in curves))
    least = allocate(curves, lowest)
    smallest = output_size(_sized(job, curves, least.sizes, least.cost).job).bytes
    if limit < smallest:
        raise UserError(f"{limit:,} bytes cannot be met; the fewest that can are {smallest:,}: {_SMALLER}")
    while True:  # the weights are nearly all of it, so that two or three rounds do
        found = allocate(curves, max(budget, lowest))
        spent = _sized(job, curves, found.sizes, found.cost)
        over = output_size(spent.job).bytes - limit
        if over <= 0:
            return spent
        budget = found.weights + over // -job.reader.dtype.itemsize


def _sized(job: Job, curves: Sequence[Curve], sizes: Sequence[int], cost: float) -> Spent:
    """The job with new sizes; what is at its full one stays whole."""
    bought = {(c.layer, c.target): (size, c.kept(size)) for c, size in zip(curves, sizes, strict=True)}

    def resized(layer: int | None, assignments: Sequence[Assignment]) -> tuple[Assignment, ...]:
        found = [(a, *bought[layer, a.target]) for a in assignments]
        return tuple(replace(a, size=size, kept=kept) for a, size, kept in found)

    shared = {a.target: a for a in resized(None, job.plan.unsized(None))}
    plan = replace(
        job.plan,
        layers=tuple(
            replace(layer, assignments=resized(layer.index, layer.assignments)) for layer in job.plan.layers
        ),
        outer=tuple(shared.get(a.target, a) for a in job.plan.outer),
    )
    return Spent(replace(job, plan=_shrunk(plan)), plan, cost)


def _shrunk(plan: ResolvedPlan) -> ResolvedPlan:
    """The plan without what stays whole."""
    layers = (replace(layer, assignments=tuple(filter(_saves, layer.assignments))) for layer in plan.layers)
    return replace(plan, layers=tuple(layers), outer=tuple(filter(_saves, plan.outer)))


def _saves(assignment: Assignment) -> bool:
    return assignment.kept < assignment.whole
