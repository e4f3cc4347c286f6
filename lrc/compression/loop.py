"""The loop: for each decoder layer observe, solve, refit, write."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrc.checkpoint.shared import SharedStaging
from lrc.checkpoint.staging import Staging
from lrc.compression.assemble import ReducedLayer, assemble
from lrc.compression.logit_scale import Final, LogitScale, fit_scale
from lrc.compression.measure import LayerMeasure, Measured
from lrc.compression.refit import LayerRefit, RefitRecord, closing_roles, held_out_blocks
from lrc.compression.solve import solve_layer
from lrc.compression.tables import Outer
from lrc.methods.contract import Solution
from lrc.modules.table import apply_table
from lrc.moments.gradient import GradientMoment
from lrc.moments.observe import observe
from lrc.plan.resolved import LayerPlan, ResolvedPlan
from lrc.run.stopwatch import Stopwatch
from lrc.text.blocks import batched
from lrc.walk.statistics import Statistics
from lrc.walk.stream import Batch, ModelStream
from lrc.walk.walk import layer_sums, read_gradients

REST = "rest"


def part_names(plan: ResolvedPlan) -> list[str]:
    """Names under which everything of a finished run is staged."""
    return [REST, *(a.target for a in plan.outer), *(part_name(layer.index) for layer in plan.layers)]


def part_name(layer: int) -> str:
    """Name under which a finished layer is staged."""
    return f"layer-{layer:05d}"


@dataclass(frozen=True)
class Passed:
    """What is kept when the original stream has gone past a layer.

    ``statistics``: what the solvers read. ``middles``, by batch: the stream between the layer's halves, where the
    attention's half is refitted to it. ``measured``: the batches on which reductions are measured, before the layer.
    """

    statistics: Statistics
    middles: list[Tensor]
    measured: list[Batch]


class Compressor:
    """One run over a model's layers, with the original hidden states and, once they part, the compressed ones.

    The states are those of this process's blocks; what is solved, stored and recorded is the same on all.
    """

    def __init__(
        self,
        stream: ModelStream,
        plan: ResolvedPlan,
        staging: Staging | SharedStaging,
        watch: Stopwatch,
    ) -> None:
        self._stream, self._plan, self._staging, self._watch = stream, plan, staging, watch
        self._ranks = stream.ranks
        self._architecture = stream.reader.architecture
        self._family = self._architecture.family
        self._outer = Outer(stream, plan, staging, watch)
        self._batches: list[Batch] = []
        # By batch, whether it chooses ridges and the logits' scale; those are the last.
        self._held: list[bool] = []
        self._any_held = self._opens = False  # in any process; whether the first block measured is here
        self._gradients: dict[int, GradientMoment] = {}  # each until its layer is solved
        # The streams are one until a reduced layer has run; without a refit nobody reads the compressed one.
        self._compressed: list[Tensor] | None = None

    def run(self, blocks: Tensor, batch_size: int, advance: Callable[[], object]) -> None:
        """Compress every layer from token blocks (n, tokens), calling ``advance`` after each."""
        if all(self._staging.has(part) for part in part_names(self._plan)):  # an earlier run got this far
            return
        self._gradients = self._sweep(blocks, batch_size)
        ids = self._split(blocks, batch_size)
        with self._watch.stage("embed"):
            self._batches = self._stream.embed(ids)
        self._part_at_embedding(blocks, ids)
        for plan in self._plan.layers:
            self._layer(plan)
            advance()
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
        """This process's blocks, in batches: those that are fitted to and then those that choose."""
        held = held_out_blocks(len(blocks))
        order = torch.cat([(~held).nonzero().flatten(), held.nonzero().flatten()])
        self._any_held = bool(held.any())
        self._opens = self._ranks.rank == (int((~held).sum()) % self._ranks.size if self._any_held else 0)
        mine = self._ranks.mine(order)
        fitted, chosen = (batched(blocks[part], batch_size) for part in (mine[~held[mine]], mine[held[mine]]))
        self._held = [False] * len(fitted) + [True] * len(chosen)
        return [*fitted, *chosen]

    def _sweep(self, blocks: Tensor, batch_size: int) -> dict[int, GradientMoment]:
        """Gradients for the solvers of the layers that no earlier run finished."""
        unsolved = [plan for plan in self._plan.layers if not self._staging.has(part_name(plan.index))]
        with self._watch.stage("gradients"):
            return read_gradients(self._stream, unsolved, self._plan.plan.calibration, blocks, batch_size)

    @property
    def _refits(self) -> bool:
        return self._plan.plan.refit == "residual"

    def _layer(self, plan: LayerPlan) -> None:
        with self._watch.stage("load"):
            layer, state = self._stream.layer(plan.index)
        if self._staging.has(part_name(plan.index)):
            self._resume(plan.index, layer)
            return
        if not plan.assignments:
            with self._watch.stage("observe"):
                self._advance_original(layer, plan.index)
                self._advance_compressed(layer, plan.index)
            self._write(plan.index, ReducedLayer(layer, {}, state, {}), [], [])
            return
        self._part_streams()
        with self._watch.stage("observe"):
            passed = self._pass_original(layer, state, plan)
        with self._watch.stage("solve"):
            solutions = solve_layer(self._architecture, plan, state, passed.statistics, self._ranks)
        with self._watch.stage("assemble"):
            roles = closing_roles(self._family, plan.targets) if self._refits else []
            dtype, skeleton = self._stream.reader.dtype, self._stream.skeletons[plan.index]
            reduced = assemble(self._architecture, skeleton, state, solutions.values(), dtype, roles)
            self._stream.filled(reduced.module, reduced.state)
        with self._watch.stage("measure"):
            measured = self._measure(layer, state, plan, solutions, passed.measured)
            records = _records(plan, solutions, measured)
            middles = passed.middles
            del solutions, passed  # in float64, and moments; their tensors are in the reduced layer now
        with self._watch.stage("refit"):
            refits: list[RefitRecord] = []
            if self._compressed is not None:
                refit = LayerRefit(self._stream, plan.index, reduced, self._batches, self._held)
                refits = refit.run(roles, middles, self._compressed)
        self._write(plan.index, reduced, records, refits)

    def _pass_original(self, layer: nn.Module, state: Mapping[str, Tensor], plan: LayerPlan) -> Passed:
        """Take the original stream past a layer and see what its solvers and its refit need of it."""
        gradients = self._gradients.pop(plan.index, None)
        sums = layer_sums(self._stream, plan, layer, state, self._plan.first_token)
        middles, measured = [], []
        states = self._stream.passing(batch.hidden for batch in self._batches)
        for batch, held, (hidden,) in zip(self._batches, self._held, states, strict=True):
            with observe(layer, {"middle": self._family.half("mlp").norm, **sums.watched}) as calls:
                out = self._stream.run(layer, plan.index, batch, hidden)
            sums.add(calls)
            if self._refits:
                middles.append(self._stream.states.keep(calls["middle"].input))
            if held or not self._any_held:
                measured.append(replace(batch))
            batch.hidden = self._stream.states.keep(out)
        return Passed(sums.results(gradients), middles, measured)

    def _measure(
        self,
        layer: nn.Module,
        state: Mapping[str, Tensor],
        plan: LayerPlan,
        solutions: Mapping[str, Solution],
        batches: Sequence[Batch],
    ) -> dict[str, Measured]:
        """What the solutions really do to the outputs of the original layer."""
        first_token = self._plan.first_token
        measure = LayerMeasure(self._stream, plan.index, state, solutions, first_token, opens=self._opens)
        states = self._stream.passing(batch.hidden for batch in batches)
        for batch, (hidden,) in zip(batches, states, strict=True):
            with observe(layer, measure.watched) as calls:
                self._stream.run(layer, plan.index, batch, hidden)
            measure.add(calls)
        return measure.results()

    def _scale(self, head: nn.Module | None) -> LogitScale | None:
        """The logits' scale, chosen on the blocks that choose ridges, with ``head`` where the original's is reduced.

        None where the plan wants none, no block is held out or everything stays whole.
        """
        chosen = [i for i, held in enumerate(self._held) if held]
        parted = self._compressed is not None or head is not None
        if not (self._any_held and parted and self._plan.plan.scales):
            return None
        logits = self._stream.tail()
        original = Final([self._batches[i].hidden for i in chosen], logits)
        hidden = [self._compressed_hidden(i) for i in chosen]
        compressed = Final(hidden, logits if head is None else self._stream.tail(head))
        return fit_scale(original, compressed, self._architecture.vocab, self._ranks)

    def _compressed_hidden(self, i: int) -> Tensor:
        return self._batches[i].hidden if self._compressed is None else self._compressed[i]

    def _part_at_embedding(self, blocks: Tensor, ids: Sequence[Tensor]) -> None:
        """Reduce the embedding by all blocks, if the plan does, and start the compressed stream of ``ids`` from it."""
        embedding = self._outer.embedding(blocks, self._batches)
        if embedding is not None and self._refits:
            with self._watch.stage("embed"):
                batches = self._stream.embed(ids, embedding)
            self._compressed = [batch.hidden for batch in batches]

    def _part_streams(self) -> None:
        if self._refits and self._compressed is None:
            self._compressed = [batch.hidden for batch in self._batches]

    def _advance_original(self, layer: nn.Module, index: int) -> None:
        self._stream.advance(layer, index, self._batches)

    def _advance_compressed(self, layer: nn.Module, index: int) -> None:
        if self._compressed is not None:
            self._stream.advance_states(layer, index, self._batches, self._compressed)

    def _resume(self, index: int, layer: nn.Module) -> None:
        """Take both streams past a layer that an earlier run finished."""
        with self._watch.stage("resume"):
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
            self._advance_original(layer, index)

    def _write(
        self, index: int, reduced: ReducedLayer, results: list[dict[str, Any]], refits: list[RefitRecord]
    ) -> None:
        with self._watch.stage("write"):
            prefix = f"{self._family.layers}.{index}."
            tensors = {prefix + name: tensor for name, tensor in reduced.state.items()}
            record = {"table": reduced.table, "results": results, "refits": [r.as_dict() for r in refits]}
            self._staging.write(part_name(index), tensors, record)


def _scaled(rest: Mapping[str, Tensor], norm: str, scale: float) -> dict[str, Tensor]:
    """The tensors of a norm, times ``scale``: the logits that a head without a bias makes of it are then, too."""
    names = [name for name in (f"{norm}.weight", f"{norm}.bias") if name in rest]
    return {name: (scale * rest[name].double()).to(rest[name].dtype) for name in names}


def _records(
    plan: LayerPlan, solutions: Mapping[str, Solution], measured: Mapping[str, Measured]
) -> list[dict[str, Any]]:
    """What the manifest and the report keep of a layer's targets."""
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
