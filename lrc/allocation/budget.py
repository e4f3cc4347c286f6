"""Budgets of a kept fraction, bytes or a KV cache, spent on curves of what sizes cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lrc.allocation.spend import Allocation, Choice, Currency, Offer, allocate
from lrc.errors import UserError
from lrc.estimate.sizes import output_size
from lrc.methods.sizes import most
from lrc.plan.job import Job
from lrc.plan.resolved import Assignment, ResolvedPlan
from lrc.walk.needs import solver_of

_SMALLER = "allow smaller sizes (lrc plan's --keeps, --floor, --round), or shrink more of the model"
_SHORT = 0.002  # fraction of a budget that may stay unspent


@dataclass(frozen=True)
class Budget:
    """Limit on what a compressed model keeps.

    ``keep``: fraction of the weights of the decoder and of tables without a size in the plan. ``bytes``: of the
    checkpoint's tensors, without other limits. ``kv_cache``: fraction of the KV cache, alone or with ``keep``.
    """

    keep: float | None = None
    bytes: int | None = None
    kv_cache: float | None = None

    def __str__(self) -> str:
        named = (("keep", self.keep), ("bytes", self.bytes), ("KV cache", self.kv_cache))
        return ", ".join(f"{name} {value:,}" for name, value in named if value is not None)


@dataclass(frozen=True)
class Spent:
    """A job with the sizes that a budget buys, and their total cost in the unit of the curves.

    ``plan``: the job's plan plus the targets that stay whole, at full size.
    """

    job: Job
    plan: ResolvedPlan
    cost: float


def read_budgets(
    keep: float | Sequence[float] | None, bytes: int | None, kv_cache: float | None
) -> list[Budget]:
    """Return a budget per keep, or one without. Raises UserError for conflicts and fractions outside (0, 1]."""
    keeps = [] if keep is None else [keep] if isinstance(keep, int | float) else list(keep)
    if bytes is not None and (keeps or kv_cache is not None):
        raise UserError("--bytes stands alone; leave out --keep and --kv-cache")
    if bytes is None and not keeps and kv_cache is None:
        raise UserError("say what to keep: --keep 0.8, --bytes 4G or --kv-cache 0.5")
    for name, value in [*(("--keep", value) for value in keeps), ("--kv-cache", kv_cache)]:
        if value is not None and not 0 < value <= 1:
            raise UserError(f"{name} {value:g} is outside (0, 1]; it is a fraction of the original")
    if len({f"{value:g}" for value in keeps}) < len(keeps):  # plan names contain this text
        raise UserError("--keep names a fraction twice")
    return [Budget(value, bytes, kv_cache) for value in keeps or [None]]


def spend(budget: Budget, job: Job, offers: Sequence[Offer]) -> Spent:
    """Return the sizes of least cost within a budget; ``job`` has the measured plan at any size.

    Raises UserError naming the smallest or largest possible budget if this one cannot be met.
    """
    if not offers:
        raise UserError(
            f"there is nothing to allocate: {job.draft.name} keeps every target whole at every measured size"
        )
    if budget.bytes is not None:
        return _spend_bytes(budget.bytes, job, offers)
    cached: list[Offer] = []
    cache = Allocation((), 0, 0.0)
    if budget.kv_cache is not None:
        cached = [each for each in offers if each.curve.target in ("qk", "ov")]
        cache = _spend_cache(budget.kv_cache, job, cached)
    rest = [offer for offer in offers if offer not in cached]
    bought = Allocation(tuple(offer.whole for offer in rest), 0, 0.0)
    if budget.keep is not None:
        whole = job.plan.budget.whole
        fixed = whole - sum(offer.whole.weights for offer in offers) + cache.weights
        bought = _spend_share(f"a keep of {budget.keep:g}", budget.keep, whole, fixed, rest, "weights")
    return _sized(job, [*cached, *rest], (*cache.choices, *bought.choices), cache.cost + bought.cost)


def shortfalls(budget: Budget, spent: Spent) -> list[str]:
    """Describe each part of a budget with over 0.2 % unspent; empty if all targets are whole."""
    plan = spent.job.plan
    if plan.budget.kept == plan.budget.whole:
        return []
    parts = (
        ("keep", budget.keep, plan.budget.keep),
        ("KV cache", budget.kv_cache, _cache_share(spent)),
        ("bytes", budget.bytes, output_size(spent.job).bytes),
    )
    return [
        f"{name} {round(kept, 4):,} instead of {asked:,}"
        for name, asked, kept in parts
        if asked is not None and kept < asked * (1 - _SHORT)
    ]


def _cache_share(spent: Spent) -> float:
    """Return the width of the KV cache over the original's."""
    heads = spent.job.reader.architecture
    narrowed = [a for layer in spent.job.plan.layers for a in layer.assignments if a.target in ("qk", "ov")]
    widths = [solver_of(a).size.inner(heads.targets[a.target], a.size) for a in narrowed]
    whole = 2 * heads.head_dim * heads.layers
    return (whole - sum(heads.head_dim - width for width in widths)) / whole


def _spend_cache(fraction: float, job: Job, offers: Sequence[Offer]) -> Allocation:
    """Spend the cache's width on qk and ov."""
    heads = job.reader.architecture
    if not offers:
        raise UserError(
            "the KV cache shrinks with the components qk and ov; the base plan has neither to shrink"
        )
    whole = 2 * heads.head_dim * heads.layers
    fixed = whole - sum(offer.whole.width for offer in offers)
    narrower = any(offer.curve.target == "qk" for offer in offers)
    closed = heads.closed.get("qk")
    without = f"this model's cannot be narrowed: {closed}" if closed else "components: qk"
    wide = "" if narrower else f" without narrower keys ({without})"
    return _spend_share(f"a KV cache of {fraction:g}{wide}", fraction, whole, fixed, offers, "width")


def _spend_share(
    asked: str, fraction: float, whole: int, fixed: int, offers: Sequence[Offer], currency: Currency
) -> Allocation:
    """Spend ``fraction`` of ``whole``, of which ``fixed`` is spent. Raises UserError if no sizes meet it."""
    limit = most(fraction, whole)
    least, largest = (fixed + sum(end(o.prices(currency)) for o in offers) for end in (min, max))
    if limit < least:
        smallest = math.ceil(least / whole * 1e4) / 1e4
        raise UserError(f"{asked} cannot be met; the smallest that can is {smallest:g}: {_SMALLER}")
    if largest < limit * (1 - _SHORT):
        nearest = math.floor(largest / whole * 1e4) / 1e4
        raise UserError(f"{asked} cannot be met; the largest that can is {nearest:g}: raise --cap")
    return allocate(offers, limit - fixed, currency)


def _spend_bytes(limit: int, job: Job, offers: Sequence[Offer]) -> Spent:
    """Spend bytes of the checkpoint's tensors; biases and kept columns are counted afterwards."""
    whole = output_size(_sized(job, offers, [offer.whole for offer in offers], 0.0).job).bytes
    if limit > whole:
        raise UserError(f"{limit:,} bytes are more than the whole model, which has {whole:,}: ask for fewer")
    lowest = sum(min(offer.prices("bytes")) for offer in offers)
    budget = sum(offer.whole.bytes for offer in offers)
    least = allocate(offers, lowest, "bytes")
    smallest = output_size(_sized(job, offers, least.choices, least.cost).job).bytes
    if limit < smallest:
        raise UserError(f"{limit:,} bytes cannot be met; the fewest that can are {smallest:,}: {_SMALLER}")
    while True:  # nearly all bytes are weights, so two or three rounds suffice
        found = allocate(offers, max(budget, lowest), "bytes")
        spent = _sized(job, offers, found.choices, found.cost)
        over = output_size(spent.job).bytes - limit
        if over <= 0:
            return spent
        budget = found.taken - over


def _sized(job: Job, offers: Sequence[Offer], choices: Sequence[Choice], cost: float) -> Spent:
    """Return the job with new sizes, without the targets that stay whole."""
    pairs = zip(offers, choices, strict=True)
    bought = {(o.curve.layer, o.curve.target): (choice.size, choice.weights) for o, choice in pairs}

    def resized(layer: int | None, assignments: Sequence[Assignment]) -> tuple[Assignment, ...]:
        found = [(a, *bought[layer, a.target]) for a in assignments]
        return tuple(replace(a, size=size, kept=kept) for a, size, kept in found)

    def shrunk(assignments: Sequence[Assignment]) -> tuple[Assignment, ...]:
        return tuple(a for a in assignments if a.kept < a.whole)

    shared = {a.target: a for a in resized(None, job.plan.unsized(None))}
    plan = replace(
        job.plan,
        layers=tuple(
            replace(layer, assignments=resized(layer.index, layer.assignments)) for layer in job.plan.layers
        ),
        outer=tuple(shared.get(a.target, a) for a in job.plan.outer),
    )
    layers = tuple(replace(layer, assignments=shrunk(layer.assignments)) for layer in plan.layers)
    return Spent(replace(job, plan=replace(plan, layers=layers, outer=shrunk(plan.outer))), plan, cost)
