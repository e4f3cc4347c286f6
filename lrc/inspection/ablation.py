"""Measure the loss with one projection or component shrunk alone, in all layers at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lrc.allocation.contract import Advance, LayerProblems, Setting, for_each_layer
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
from lrc.plan.schema import Calibration, Plan
from lrc.records.ablation import Ablated, Losses
from lrc.run.offload import States
from lrc.text.blocks import batched
from lrc.text.mixture import DataLike
from lrc.walk.stream import ModelStream

# A3 for components; for one matrix SVD whitened by its input (SVD-LLM), which reads no gradients.
COMPONENT_METHOD = "a3"
PROJECTION_METHOD = "whitened_svd"
CALIBRATION = Calibration()
_COARSE = 0.1  # of the fraction asked for


def losses(setting: Setting, cut: Tensor, scratch: Path, advance: Advance) -> list[float]:
    """Return the nats per token of windows ``cut`` (windows, n) under each plan of a setting.

    Each plan shrinks one target in all layers. One walk on the calibration text fits all plans; each plan has its own
    hidden states of the windows. ``advance`` is called with the layers done. ``scratch``: the folder of states that do
    not fit in memory.
    """
    reader, processes = setting.reader, setting.processes
    mine = processes.mine(cut)
    held = mine.numel() * reader.architecture.hidden * setting.dtype.itemsize * len(setting.plans)
    states = States(place_for(held, setting.device), scratch)
    # In the model's dtype, as transformers runs it, not with the float32 residual stream of the moments.
    text = ModelStream(
        reader, setting.device, setting.dtype, states, processes=processes, residual=setting.dtype
    )
    ids = batched(mine, setting.batch_size)
    batches = text.embed(ids)
    texts = [[replace(batch) for batch in batches] for _ in setting.plans]
    del batches  # frees the states before the first layer

    def look(layer: LayerProblems) -> None:
        index = layer.layer
        assert index is not None, "an ablation plan leaves what is outside the layers alone"

        def solution(assignment: Assignment) -> Solution:
            return solve(layer.problems[assignment.target], assignment)

        assigned = [plan.layers[index].assignments[0] for plan in setting.plans]
        for own, solved in zip(texts, processes.spread(assigned, solution), strict=True):
            text.advance(setting.reduced(text, index, layer.state, solved), index, own)

    for_each_layer(setting, look, advance)
    tail, found = text.tail(), []
    for own in texts:
        arriving = text.prefetched(batch.hidden for batch in own)
        nats = sum(
            float(token_nll(tail(states), one).double().sum())
            for (states,), one in zip(arriving, ids, strict=True)
        )
        found.append(math.fsum(processes.gather(nats)) / (cut.numel() - len(cut)))
    return found


def choose_targets(architecture: Architecture, method: str | None) -> dict[str, str]:
    """Return the method of each component and projection of a layer; with ``method``, of the targets it solves.

    Raises UserError for an unknown method, and for a method that solves none of them.
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


@dataclass(frozen=True)
class Trial:
    """One target to shrink alone, in all layers at once: its method, the fraction ``keep`` of its weights, its plan."""

    target: str
    method: str
    keep: float
    job: Job

    @classmethod
    def of(
        cls,
        model: ResolvedModel,
        reader: CheckpointReader,
        target: str,
        method: str,
        keep: float,
        calib: DataLike | None = None,
    ) -> Trial:
        """Return a trial on calibration texts. Raises UserError if the method has no legal size for the target."""
        section = "components" if target in COMPONENTS else "projections"
        entries: dict[str, Any] = {section: {target: {"method": method, "keep": keep}}}
        plan = Plan(refit="none", calibration=CALIBRATION, **entries)
        job = make_job(model, reader, draft_of(plan, f"ablation of {target} at keep {keep:g}"), calib)
        return cls(target, method, keep, job)

    @property
    def assignment(self) -> Assignment | None:
        """The target's assignment, the same in each layer; None if even its smallest size is the whole target."""
        return next(iter(self.job.plan.layers[0].assignments), None)

    @property
    def key(self) -> dict[str, Any]:
        """What identifies the trial among cached losses."""
        options = self.assignment.options if self.assignment else {}
        return {"target": self.target, "method": self.method, "keep": self.keep, "options": options}

    def result(self, known: Losses) -> Ablated:
        """Return the record of the trial from the losses known, which must include its own."""
        assert known.dense is not None
        dense, one = known.dense.nats / known.dense.tokens, self.assignment
        nats, kept = (known.of(self.key), one.kept / one.whole) if one else (dense, 1.0)
        assert nats is not None
        return Ablated(self.target, self.method, self.keep, kept, nats, _exp(nats), _exp(nats - dense) - 1)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf if nats == nats else math.nan


def coarse_notes(results: Sequence[Ablated]) -> list[str]:
    """Return a note for each target whose nearest size is far from the fraction asked for."""
    return [
        f"{r.target} keeps {r.kept:.4g} of its weights where {r.keep:g} is asked for; its sizes are coarse"
        for r in results
        if abs(r.kept - r.keep) > _COARSE * r.keep
    ]
