"""Compress a model layer by layer: observe, solve, assemble, measure, refit, write."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrc.checkpoint.staging import SharedStaging, Staging
from lrc.compression.assemble import ReducedLayer, assemble
from lrc.compression.logit_scale import Final, LogitScale, fit_scale
from lrc.compression.measure import LayerMeasure, Measured
from lrc.compression.refit import LayerRefit, RefitRecord, closing_roles, held_out_blocks
from lrc.compression.solve import solve_layer
from lrc.compression.tables import Outer
from lrc.methods.contract import Solution
from lrc.modules.table import apply_table
from lrc.moments.gradient import GradientMoment
from lrc.moments.observe import Call
from lrc.moments.statistic import Found, Layer, Observer
from lrc.plan.resolved import LayerPlan, ResolvedPlan
from lrc.run.processes import Processes
from lrc.run.settings import Progress, unseen
from lrc.run.stopwatch import Stopwatch
from lrc.text.blocks import batched
from lrc.walk.backward import read_gradients
from lrc.walk.stream import Batch, ModelStream
from lrc.walk.walk import Visit, Walk

REST = "rest"


def part_names(plan: ResolvedPlan) -> list[str]:
    """Return the names of all parts that a finished run has staged."""
    return [REST, *(a.target for a in plan.outer), *(part_name(layer.index) for layer in plan.layers)]


def part_name(layer: int) -> str:
    """Return the name of the staged part that holds a layer."""
    return f"layer-{layer:05d}"


@dataclass(frozen=True)
class Passed:
    """Hold the results of running an original layer: inputs of its solvers, measurement and refit.

    ``found``: statistics for the solvers. ``middles``: per batch, the residual stream between attention and MLP, the
    target of the attention refit; empty without refit. ``measured``: the layer's inputs for the measurement.
    """

    found: Found
    middles: list[Tensor]
    measured: list[Batch]


class Kept(Observer):
    """Store the inputs of one module of a layer by batch, as ``keep`` returns them."""

    def __init__(self, index: int, path: str, keep: Callable[[Tensor], Tensor]) -> None:
        self.index, self._path, self._keep = index, path, keep
        self.inputs: list[Tensor] = []

    @property
    def watched(self) -> Collection[str]:
        return (self._path,)

    def add(self, calls: Mapping[str, Call]) -> None:
        self.inputs.append(self._keep(calls[self._path].input))

    def reduce(self, processes: Processes) -> None:
        """Do nothing: every process keeps the inputs of its own batches."""


class Compressor:
    """One compression run: its calibration blocks go through the original and the compressed layers side by side.

    Each process holds the hidden states of its own blocks. Solutions and records are the same on all processes.
    """

    def __init__(
        self,
        stream: ModelStream,
        plan: ResolvedPlan,
        staging: Staging | SharedStaging,
        watch: Stopwatch,
    ) -> None:
        self._stream, self._plan, self._staging, self._watch = stream, plan, staging, watch
        self._processes = stream.processes
        self._architecture = stream.reader.architecture
        self._family = self._architecture.family
        self._outer = Outer(stream, plan, staging, watch)
        self._batches: list[Batch] = []
        # Per batch: held out of the fits, to choose ridges and the logit scale. Held-out batches come last.
        self._held: list[bool] = []
        # Whether any process has held-out blocks; whether this one has the first measured block.
        self._any_held = self._opens = False
        self._gradients: dict[int, GradientMoment] = {}  # by layer, until it is solved
        # None without refit, and before the first reduction, where it would equal the original stream.
        self._compressed: list[Tensor] | None = None

    def run(self, blocks: Tensor, batch_size: int, start: Progress = unseen) -> None:
        """Compress and stage the model from token blocks (n, tokens); ``start`` starts the progress of each stage."""
        total, layers = len(self._plan.layers), [part_name(plan.index) for plan in self._plan.layers]
        known = [part for part in layers if self._staging.has(part)]  # finished by an earlier run
        if all(self._staging.has(part) for part in part_names(self._plan)):
            start("compress", total)(total)
            return
        self._gradients = self._sweep(blocks, batch_size, start)
        ids = self._split(blocks, batch_size)
        with self._watch.stage("embed"):
            self._batches = self._stream.embed(ids)
        self._part_at_embedding(blocks, ids)
        walk = Walk(self._stream, self._batches, first_token=self._plan.first_token, watch=self._watch)
        advance = start("compress", total)
        if known:
            advance(len(known))
        resumed = start("resume", len(known)) if known else advance
        for visit, plan in zip(walk, self._plan.layers, strict=True):
            self._layer(plan, visit)
            (resumed if part_name(plan.index) in known else advance)(1)
        head = self._outer.head(self._batches)
        with self._watch.stage("scale"):
            scale = self._scale(head)
        with self._watch.stage("write"):
            rest = self._outer.left(self._stream.reader.rest())
            if scale is not None:
                rest |= _scaled(rest, self._family.final_norm, scale.value)
            record = {"table": {}, "results": [], "scale": scale and asdict(scale)}
            self._staging.write(REST, rest, record)

    def _split(self, blocks: Tensor, batch_size: int) -> list[Tensor]:
        """Return this process's blocks in batches, the held-out ones last."""
        held = held_out_blocks(len(blocks))
        order = torch.cat([(~held).nonzero().flatten(), held.nonzero().flatten()])
        self._any_held = bool(held.any())
        self._opens = self._processes.rank == (
            int((~held).sum()) % self._processes.size if self._any_held else 0
        )
        mine = self._processes.mine(order)
        fitted, chosen = (batched(blocks[part], batch_size) for part in (mine[~held[mine]], mine[held[mine]]))
        self._held = [False] * len(fitted) + [True] * len(chosen)
        return [*fitted, *chosen]

    def _sweep(self, blocks: Tensor, batch_size: int, start: Progress) -> dict[int, GradientMoment]:
        """Return gradient moments for the solvers of the unfinished layers."""
        unsolved = [plan for plan in self._plan.layers if not self._staging.has(part_name(plan.index))]
        with self._watch.stage("gradients"):
            calibration = self._plan.plan.calibration
            return read_gradients(self._stream, unsolved, calibration, blocks, batch_size, start=start)

    @property
    def _refits(self) -> bool:
        return self._plan.plan.refit == "residual"

    def _layer(self, plan: LayerPlan, visit: Visit) -> None:
        if self._staging.has(part_name(plan.index)):
            with self._watch.stage("resume"):
                self._resume(plan.index)
            visit.observe()
            return
        layer = visit.layer
        state = layer.state
        if not plan.assignments:
            visit.observe()
            with self._watch.stage("observe"):
                self._advance_compressed(layer.module, plan.index)
            self._write(plan.index, ReducedLayer(layer.module, {}, dict(state), {}), [], [])
            return
        self._part_streams()
        passed = self._pass_original(visit, plan)
        with self._watch.stage("solve"):
            solutions = solve_layer(self._architecture, plan, state, passed.found, self._processes)
        with self._watch.stage("assemble"):
            roles = closing_roles(self._family, plan.targets) if self._refits else []
            dtype, skeleton = self._stream.reader.dtype, self._stream.skeletons[plan.index]
            reduced = assemble(self._architecture, skeleton, state, solutions.values(), dtype, roles)
            self._stream.filled(reduced.module, reduced.state)
        with self._watch.stage("measure"):
            measured = self._measure(layer, solutions, passed.measured)
            records = _records(plan, solutions, measured)
            middles = passed.middles
            del solutions, passed  # large: float64 solutions and moments
        with self._watch.stage("refit"):
            refits: list[RefitRecord] = []
            if self._compressed is not None:
                refit = LayerRefit(self._stream, plan.index, reduced, self._batches, self._held)
                refits = refit.run(roles, middles, self._compressed)
        self._write(plan.index, reduced, records, refits)

    def _pass_original(self, visit: Visit, plan: LayerPlan) -> Passed:
        """Run the original layer on all batches, in place; copy first the batches to measure."""
        pairs = zip(self._batches, self._held, strict=True)
        measured = [replace(batch) for batch, held in pairs if held or not self._any_held]
        middles = Kept(plan.index, self._family.half("mlp").norm, self._stream.states.keep)
        found = visit.read(plan, self._gradients.pop(plan.index, None), *([middles] if self._refits else []))
        return Passed(found, middles.inputs, measured)

    def _measure(
        self, layer: Layer, solutions: Mapping[str, Solution], batches: Sequence[Batch]
    ) -> dict[str, Measured]:
        """Return the error of each solution, put alone into the original layer, by target."""
        measure = LayerMeasure(self._stream, layer, solutions, opens=self._opens)
        self._stream.advance(layer.module, layer.index, batches, measure, stay=True)
        return measure.result()

    def _scale(self, head: nn.Module | None) -> LogitScale | None:
        """Fit the logit scale on the held-out blocks; ``head`` is the reduced LM head, if any.

        None if the plan has no scale, no block is held out or nothing is reduced.
        """
        chosen = [i for i, held in enumerate(self._held) if held]
        parted = self._compressed is not None or head is not None
        if not (self._any_held and parted and self._plan.plan.scales):
            return None
        logits = self._stream.tail()
        original = Final([self._batches[i].hidden for i in chosen], logits)
        hidden = [self._compressed_hidden(i) for i in chosen]
        compressed = Final(hidden, logits if head is None else self._stream.tail(head))
        return fit_scale(original, compressed, self._architecture.vocab, self._processes)

    def _compressed_hidden(self, i: int) -> Tensor:
        return self._batches[i].hidden if self._compressed is None else self._compressed[i]

    def _part_at_embedding(self, blocks: Tensor, ids: Sequence[Tensor]) -> None:
        """Reduce the embedding if the plan does; with refit, start the compressed stream from it."""
        embedding = self._outer.embedding(blocks, self._batches)
        if embedding is not None and self._refits:
            with self._watch.stage("embed"):
                batches = self._stream.embed(ids, embedding)
            self._compressed = [batch.hidden for batch in batches]

    def _part_streams(self) -> None:
        if self._refits and self._compressed is None:
            self._compressed = [batch.hidden for batch in self._batches]

    def _advance_compressed(self, layer: nn.Module, index: int) -> None:
        if (compressed := self._compressed) is not None:
            pairs = zip(self._batches, compressed, strict=True)
            batches = [replace(batch, hidden=hidden) for batch, hidden in pairs]
            compressed.clear()  # so that the states before and after the layer are not held at once
            self._stream.advance(layer, index, batches)
            compressed += [batch.hidden for batch in batches]

    def _resume(self, index: int) -> None:
        """Run the compressed stream through a layer that an earlier run finished."""
        prefix = f"{self._family.layers}.{index}."
        tensors = self._staging.tensors(part_name(index))
        state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        table = self._staging.record(part_name(index))["table"]
        module = copy.deepcopy(self._stream.skeletons[index])
        apply_table(module, table, self._family)
        self._stream.filled(module, state)
        if table:
            self._part_streams()
        self._advance_compressed(module, index)

    def _write(
        self, index: int, reduced: ReducedLayer, results: list[dict[str, Any]], refits: list[RefitRecord]
    ) -> None:
        with self._watch.stage("write"):
            prefix = f"{self._family.layers}.{index}."
            tensors = {prefix + name: tensor for name, tensor in reduced.state.items()}
            record = {"table": reduced.table, "results": results, "refits": [r.as_dict() for r in refits]}
            self._staging.write(part_name(index), tensors, record)


def _scaled(rest: Mapping[str, Tensor], norm: str, scale: float) -> dict[str, Tensor]:
    """Return the tensors of a norm times ``scale``, which scales the logits of a head without bias."""
    names = [name for name in (f"{norm}.weight", f"{norm}.bias") if name in rest]
    return {name: (scale * rest[name].double()).to(rest[name].dtype) for name in names}


def _records(
    plan: LayerPlan, solutions: Mapping[str, Solution], measured: Mapping[str, Measured]
) -> list[dict[str, Any]]:
    """Return the records of a layer's targets for the manifest and the report."""
    return [
        {
            **asdict(assignment),
            "layer": plan.index,
            "predicted": asdict(solutions[assignment.target].predicted),
            "numerics": dict(solutions[assignment.target].numerics),
            "measured": asdict(measured[assignment.target]),
        }
        for assignment in plan.assignments
    ]
