"""Losses with one projection or component shrunk alone, in all layers at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lrc.allocation.contract import Advance, Setting
from lrc.allocation.problems import Posed, each_posed
from lrc.checkpoint.reader import CheckpointReader
from lrc.compression.solve import solve
from lrc.errors import UserError, nearest
from lrc.estimate.room import place_for
from lrc.evaluation.tokens import token_nll
from lrc.families import Architecture
from lrc.hub.names import ResolvedModel
from lrc.methods import methods
from lrc.methods.contract import Solution
from lrc.plan.job import Job, make_job
from lrc.plan.library import draft_of
from lrc.plan.precedence import COMPONENTS
from lrc.plan.resolved import Assignment
from lrc.plan.schema import Calibration, Components, Entry, Plan, Projections
from lrc.records.ablation import Ablated, ablated
from lrc.records.losses import Losses
from lrc.run.offload import States
from lrc.text.blocks import batched
from lrc.walk.stream import ModelStream

# What people know of each: the published components, and for one matrix the SVD whitened by its input (SVD-LLM), which
# reads no gradients.
COMPONENT_METHOD = "a3"
PROJECTION_METHOD = "whitened_svd"
CALIBRATION = Calibration()
_COARSE = 0.1  # of the fraction asked for


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
    texts = [[replace(batch) for batch in batches] for _ in setting.plans]
    del batches  # or the states before the first layer would be there to the end

    def look(posed: Posed) -> None:
        index = posed.layer
        assert index is not None, "an ablation plan leaves what is outside the layers alone"

        def solution(assignment: Assignment | None) -> Solution | None:
            return solve(posed.problems[assignment.target], assignment) if assignment else None

        assigned = [next(iter(plan.unsized(index)), None) for plan in setting.plans]
        for own, solved in zip(texts, ranks.spread(assigned, solution), strict=True):
            if solved is None:
                layer = text.materialize(index, posed.state)
            else:
                layer = setting.reduced(text, index, posed.state, solved)
            text.advance(layer, index, own)

    each_posed(setting, look, advance)
    tail, found = text.tail(), []
    for own in texts:
        arriving = text.passing(batch.hidden for batch in own)
        nats = sum(
            float(token_nll(tail(states), one).double().sum())
            for (states,), one in zip(arriving, ids, strict=True)
        )
        found.append(math.fsum(ranks.gather(nats)) / (cut.numel() - len(cut)))
    return found


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


def shrinking_job(
    model: ResolvedModel, reader: CheckpointReader, target: str, method: str, keep: float
) -> Job:
    """A plan that shrinks one target in all layers; UserError where it has no size that keeps so little."""
    entries = {target: Entry(method=method, keep=keep)}
    if target in COMPONENTS:
        plan = Plan(refit="none", calibration=CALIBRATION, components=Components(**entries))
    else:
        plan = Plan(refit="none", calibration=CALIBRATION, projections=Projections(**entries))
    return make_job(model, reader, draft_of(plan, f"ablation of {target} at keep {keep:g}"))


def asked_of(job: Job) -> dict[str, Any]:
    """Target, method, fraction and options of a job: what one cost is of."""
    (target, entry), *_ = (
        *job.plan.plan.components.entries().items(),
        *job.plan.plan.projections.entries().items(),
    )
    first = next(iter(job.plan.layers[0].assignments), None)
    options = first.options if first else {}
    return {"target": target, "method": entry.method, "keep": entry.keep, "options": options}


def shrinks(job: Job) -> bool:
    """Whether anything is shrunk: nearest to a fraction near 1 may be the whole, in all layers, which are alike."""
    return bool(job.plan.layers[0].assignments)


def result_of(job: Job, known: Losses) -> Ablated:
    """Return the record of one job from the losses known so far, which must hold its own."""
    assert known.dense is not None
    asked, dense = asked_of(job), known.dense.nats / known.dense.tokens
    nats = known.of(asked) if shrinks(job) else dense
    assert nats is not None
    kept = next((a.kept / a.whole for a in job.plan.layers[0].assignments), 1.0)
    return ablated(asked["target"], asked["method"], asked["keep"], kept, nats, dense)


def coarse_notes(results: Sequence[Ablated]) -> list[str]:
    """What to say of sizes that are too coarse for what was asked."""
    return [
        f"{r.target} keeps {r.kept:.4g} of its weights where {r.keep:g} is asked for; its sizes are coarse"
        for r in results
        if abs(r.kept - r.keep) > _COARSE * r.keep
    ]
