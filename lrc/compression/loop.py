"""Compress a model layer by layer: observe, solve, assemble, measure, refit, write."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrc.checkpoint.staging import SharedStaging, Staging
from lrc.compression.assemble import ReducedLayer, assemble
from lrc.compression.embedding import TableCompressor
from lrc.compression.logit_scale import CHUNK_BYTES, Final, LogitScale, fit_channels, fit_scale
from lrc.compression.measure import LayerMeasure, target_record
from lrc.compression.norms import StreamNorms
from lrc.compression.refit import LayerRefit, closing_roles, held_out_mask
from lrc.compression.ridge import RefitRecord
from lrc.compression.solve import solve_layer
from lrc.errors import UserError
from lrc.families import Architecture
from lrc.modules.table import apply_table
from lrc.moments.gradient import GradientMoment
from lrc.moments.observe import Call
from lrc.moments.statistic import Observer
from lrc.plan.resolved import LayerPlan, ResolvedPlan
from lrc.run.processes import Processes
from lrc.run.settings import Progress, unseen
from lrc.run.stopwatch import Stopwatch
from lrc.text.blocks import batched
from lrc.walk.backward import read_gradients
from lrc.walk.stream import Batch, ModelStream, below
from lrc.walk.walk import Visit, Walk

REST = "rest"


def part_names(plan: ResolvedPlan) -> list[str]:
    """Return the names of all parts that a finished run has staged."""
    return [REST, *(a.target for a in plan.outer), *(part_name(layer.index) for layer in plan.layers)]


def part_name(layer: int) -> str:
    """Return the name of the staged part that holds a layer."""
    return f"layer-{layer:05d}"


class MiddleRecorder(Observer):
    """Store what attention makes of the residual stream, by batch, as ``keep`` returns it: the goal of its refit."""

    def __init__(self, index: int, architecture: Architecture, keep: Callable[[Tensor], Tensor]) -> None:
        self.index, self._architecture, self._keep = index, architecture, keep
        self._entry = architecture.family.half("mlp").entry
        self.streams: list[Tensor] = []

    @property
    def watched(self) -> Collection[str]:
        family = self._architecture.family
        return (self._entry, *([family.attention] if self._architecture.parallel else []))

    def add(self, calls: Mapping[str, Call]) -> None:
        stream = calls[self._entry].input
        if self._architecture.parallel:
            stream = stream + calls[self._architecture.family.attention].output[0]
        self.streams.append(self._keep(stream))

    def reduce(self, processes: Processes) -> None:
        """Do nothing: every process keeps the streams of its own batches."""


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
        self._tables = TableCompressor(stream, plan, staging, watch)
        self._batches: list[Batch] = []
        # Per batch: held out of all fits with a refit, to judge them and fit the logit scale. They come last.
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
        unsolved = [plan for plan in self._plan.layers if part_name(plan.index) not in known]
        with self._watch.stage("gradients"):
            calibration = self._plan.plan.calibration
            seen = blocks[~held_out_mask(len(blocks))] if self._refits else blocks
            self._gradients = read_gradients(
                self._stream, unsolved, calibration, seen, batch_size, start=start
            )
        ids = self._split(blocks, batch_size)
        with self._watch.stage("embed"):
            self._batches = self._stream.embed(ids)
            for batch, held in zip(self._batches, self._held, strict=True):
                batch.held = held and self._refits
        embedding = self._tables.embedding(seen, self._seen)
        if embedding is not None and self._refits:
            with self._watch.stage("embed"):
                self._compressed = [batch.hidden for batch in self._stream.embed(ids, embedding)]
        del embedding  # large: it would stay on the device during all layers
        walk = Walk(self._stream, self._batches, first_token=self._plan.first_token, watch=self._watch)
        advance = start("compress", total)
        if known:
            advance(len(known))
        resumed = start("resume", len(known)) if known else advance
        for visit, plan in zip(walk, self._plan.layers, strict=True):
            self._layer(plan, visit)
            (resumed if part_name(plan.index) in known else advance)(1)
        self._check_logits()
        head = self._tables.head(self._seen)
        with self._watch.stage("scale"):
            factors, scale = self._scale(head)
        with self._watch.stage("write"):
            rest = self._tables.unreplaced(self._stream.reader.rest())
            # A scaled norm scales the logits of a head without bias.
            for each, offset in (("weight", self._family.norm_offset), ("bias", 0)):
                name = f"{self._family.final_norm}.{each}"
                if scale is not None and name in rest:
                    scaled = factors * (offset + rest[name].double()) - offset
                    rest[name] = scaled.to(rest[name].dtype)
            record = {"table": {}, "results": [], "scale": scale and asdict(scale)}
            self._staging.write(REST, rest, record)

    def _split(self, blocks: Tensor, batch_size: int) -> list[Tensor]:
        """Return this process's blocks in batches, the held-out ones last."""
        held = held_out_mask(len(blocks))
        order = torch.cat([(~held).nonzero().flatten(), held.nonzero().flatten()])
        self._any_held = bool(held.any())
        self._opens = self._processes.rank == (
            int((~held).sum()) % self._processes.size if self._any_held else 0
        )
        mine = self._processes.mine(order)
        fitted, chosen = (batched(blocks[part], batch_size) for part in (mine[~held[mine]], mine[held[mine]]))
        self._held = [False] * len(fitted) + [True] * len(chosen)
        return [*fitted, *chosen]

    @property
    def _refits(self) -> bool:
        return self._plan.plan.refit == "residual"

    @property
    def _seen(self) -> list[Batch]:
        """Return the batches that methods see."""
        return [batch for batch in self._batches if not batch.held]

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
            self._write(plan.index, ReducedLayer(layer.module, {}, dict(state), {}), [])
            return
        self._part_streams()
        # The batches to measure, before the original layer changes them in place.
        pairs = zip(self._batches, self._held, strict=True)
        chosen = [replace(batch) for batch, held in pairs if held or not self._any_held]
        middles = MiddleRecorder(plan.index, self._architecture, self._stream.states.keep)
        observers = [middles] if self._refits else []
        found = visit.read(plan, self._gradients.pop(plan.index, None), *observers)
        with self._watch.stage("solve"):
            solutions = solve_layer(self._architecture, plan, state, found, self._processes)
        with self._watch.stage("assemble"):
            roles = closing_roles(self._family, plan.targets) if self._refits else []
            skeleton = self._stream.skeletons[plan.index]
            reduced = assemble(self._architecture, skeleton, state, solutions.values(), roles)
            self._stream.filled(reduced.module, reduced.state)
        with self._watch.stage("measure"):
            measure = LayerMeasure(self._stream, layer, solutions, opens=self._opens)
            self._stream.advance(layer.module, layer.index, chosen, measure, stay=True)
            measured = measure.result()
            records = [
                target_record(a, plan.index, solutions[a.target], measured[a.target])
                for a in plan.assignments
            ]
            del solutions, found, chosen, measure  # large: float64 solutions and moments
        with self._watch.stage("refit"):
            refits, norms = list[RefitRecord](), None
            if self._compressed is not None:
                refit = LayerRefit(self._stream, plan.index, reduced, self._batches, self._held)
                refits, norms = refit.run(roles, middles.streams, self._compressed)
        self._write(plan.index, reduced, records, refits, norms)

    def _check_logits(self) -> None:
        """Raise UserError if the original's logits of the first tokens are NaN or inf."""
        rows = max(CHUNK_BYTES // (4 * self._architecture.vocab), 1)
        if self._batches and not self._staging.has(REST):
            logits = self._stream.tail()(self._batches[0].hidden.flatten(0, -2)[:rows])
            if not bool(logits.isfinite().all()):
                raise UserError("the model's logits are NaN or inf; try --dtype float32")

    def _scale(self, head: nn.Module | None) -> tuple[Tensor, LogitScale | None]:
        """Fit the scale of the logits on the held-out blocks; return factors of the final norm, and the record.

        ``head`` is the reduced LM head, if any. The record is None if the plan has no scale, no block is held out,
        nothing is reduced, or a soft cap follows the head, as logits are then not linear in the scale.
        """
        chosen = [i for i, held in enumerate(self._held) if held]
        parted = self._compressed is not None or head is not None
        one, plan = torch.ones((), dtype=torch.float64), self._plan.plan
        capped = self._architecture.logits.cap is not None
        if capped or not (self._any_held and parted and plan.scales):
            return one, None
        logits = self._stream.tail()
        states = [batch.hidden for batch in self._batches]
        original = Final([states[i] for i in chosen], logits)
        reduced = states if self._compressed is None else self._compressed
        compressed = Final([reduced[i] for i in chosen], logits if head is None else self._stream.tail(head))
        vocab, processes = self._architecture.vocab, self._processes
        scale = fit_scale(original, compressed, vocab, processes)
        if plan.scale == "logits":
            return scale.value * one, scale
        return fit_channels(original, compressed, scale, self._architecture.hidden, vocab, processes)

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
        state = below(self._staging.tensors(part_name(index)), f"{self._family.layers}.{index}")
        table = self._staging.record(part_name(index))["table"]
        module = copy.deepcopy(self._stream.skeletons[index])
        apply_table(module, table, self._family)
        self._stream.filled(module, state)
        if table:
            self._part_streams()
        self._advance_compressed(module, index)

    def _write(
        self,
        index: int,
        reduced: ReducedLayer,
        results: list[dict[str, Any]],
        refits: Sequence[RefitRecord] = (),
        norms: StreamNorms | None = None,
    ) -> None:
        with self._watch.stage("write"):
            prefix = f"{self._family.layers}.{index}."
            tensors = {prefix + name: tensor for name, tensor in reduced.state.items()}
            record = {
                "table": reduced.table,
                "results": results,
                "refits": [asdict(each) for each in refits],
                "norms": norms and asdict(norms),
            }
            self._staging.write(part_name(index), tensors, record)
