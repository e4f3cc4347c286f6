"""The loop: for each decoder layer observe, solve, refit, write."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrc.assemble import ReducedLayer, assemble
from lrc.checkpoint.staging import Staging
from lrc.collect import Statistics
from lrc.families.family import ATTENTION_ROLES
from lrc.measure import LayerMeasure
from lrc.methods.contract import Affine, Solution
from lrc.modules import StructuredLinear
from lrc.modules.table import apply_table
from lrc.moments.gradient import GradientMoment
from lrc.moments.observe import observe
from lrc.outer import Outer
from lrc.plan.resolved import LayerPlan, ResolvedPlan
from lrc.refit import Refit, RefitRecord, RefitSum, held_out_blocks
from lrc.scale import Final, LogitScale, fit_scale
from lrc.solve import read_gradients, read_statistics, solve_layer
from lrc.stopwatch import Stopwatch
from lrc.stream import Batch, ModelStream

REST = "rest"


def part_names(plan: ResolvedPlan) -> list[str]:
    """Names under which everything of a finished run is staged."""
    return [REST, *(a.target for a in plan.outer), *(part_name(layer.index) for layer in plan.layers)]


def part_name(layer: int) -> str:
    """Name under which a finished layer is staged."""
    return f"layer-{layer:05d}"


@dataclass(frozen=True)
class OutputSum:
    """What is summed to refit the linear at ``path`` of a reduced layer."""

    path: str
    sums: RefitSum


class Compressor:
    """One run over a model's layers, with the original hidden states and, once they part, the compressed ones."""

    def __init__(self, stream: ModelStream, plan: ResolvedPlan, staging: Staging, watch: Stopwatch) -> None:
        self._stream, self._plan, self._staging, self._watch = stream, plan, staging, watch
        self._architecture = stream.reader.architecture
        self._family = self._architecture.family
        self._outer = Outer(stream, plan, staging, watch)
        self._batches: list[Batch] = []
        self._gradients: dict[int, GradientMoment] = {}  # on the host, each until its layer is solved
        self._held: list[Tensor] = []  # by batch, which of its blocks choose ridges and the logits' scale
        # The streams are one until a reduced layer has run; without a refit nobody reads the compressed one.
        self._compressed: list[Tensor] | None = None

    def run(self, blocks: Tensor, batch_size: int, advance: Callable[[], object]) -> None:
        """Compress every layer from token blocks (n, tokens), calling ``advance`` after each."""
        if self._staging.has(REST):  # written last: an earlier run got this far
            return
        self._gradients = self._sweep(blocks, batch_size)
        with self._watch.stage("embed"):
            self._batches = self._stream.embed(blocks, batch_size)
            self._held = list(held_out_blocks(len(blocks)).split(batch_size))
        self._part_at_embedding(blocks, batch_size)
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
        with self._watch.stage("observe"):
            statistics = self._observe(layer, state, plan)
        with self._watch.stage("solve"):
            solutions = solve_layer(self._architecture, plan, state, statistics)
            del statistics
        with self._watch.stage("assemble"):
            plain = self._refit_roles(plan) if self._refits else []
            dtype, skeleton = self._stream.reader.dtype, self._stream.skeletons[plan.index]
            reduced = assemble(self._architecture, skeleton, state, solutions.values(), dtype, plain)
            self._stream.filled(reduced.module, reduced.state)
            measure = LayerMeasure(self._stream, plan.index, state, solutions)
            records = _records(plan, solutions)
            del solutions  # in float64; their tensors are in the reduced layer now
        refits = self._fit(layer, plan, reduced, measure)
        for record, measured in zip(records, measure.results().values(), strict=True):
            record["measured"] = asdict(measured)
        self._write(plan.index, reduced, records, refits)

    def _observe(self, layer: nn.Module, state: Mapping[str, Tensor], plan: LayerPlan) -> Statistics:
        """What the layer's solvers need to know of the original stream."""
        gradients = self._gradients.pop(plan.index, None)
        return read_statistics(self._stream, plan, layer, state, self._batches, gradients)

    def _refit_roles(self, plan: LayerPlan) -> list[str]:
        """Output projections that close a half of the layer in which something was reduced."""
        targets = {assignment.target for assignment in plan.assignments}
        attention, mlp = {"qk", "ov", *ATTENTION_ROLES}, {"mlp", *self._family.component("mlp")}
        return [role for role, half in (("o", attention), (self._family.mlp_output, mlp)) if targets & half]

    def _fit(
        self, layer: nn.Module, plan: LayerPlan, reduced: ReducedLayer, measure: LayerMeasure
    ) -> list[RefitRecord]:
        """Measure the reductions, refit the output projections and take both streams past the layer."""
        refits: list[RefitRecord] = []
        roles = self._refit_roles(plan) if self._refits else []
        outputs = {role: path for role in roles if (path := _output_path(reduced, role)) is not None}
        self._part_streams()
        with self._watch.stage("measure"):
            attention = self._refit_sum(reduced, outputs["o"]) if "o" in outputs else None
            for i in range(len(self._batches)):
                self._pass_original(i, layer, plan.index, reduced, measure, attention)
        with self._watch.stage("refit"):
            if attention is not None:
                refits.append(self._replace(reduced, attention).record(plan.index, "o"))
            role = self._family.mlp_output
            if role in outputs:
                mlp = self._refit_sum(reduced, outputs[role])
                for i in range(len(self._batches)):
                    self._add_mlp(i, plan.index, reduced, mlp)
                refits.append(self._replace(reduced, mlp).record(plan.index, role))
            self._advance_compressed(reduced.module, plan.index)
        return refits

    def _pass_original(
        self,
        i: int,
        layer: nn.Module,
        index: int,
        reduced: ReducedLayer,
        measure: LayerMeasure,
        attention: OutputSum | None,
    ) -> None:
        """Take a batch's original stream past the layer; on the way measure, and sum for the o-projection's refit.

        The attention half must bring the compressed stream to where the original is between the two halves.
        """
        batch, middle = self._batches[i], self._family.mlp_norm
        with observe(layer, {"middle": middle, **measure.watched}) as calls:
            out = self._stream.run(layer, index, batch, batch.hidden)
        measure.add(calls)
        if attention is not None:
            hidden = self._compressed_hidden(i)
            with observe(reduced.module, {"x": attention.path}, stop_at="x") as seen:
                self._stream.run(reduced.module, index, batch, hidden)
            self._add(i, reduced, attention, seen["x"].input, calls["middle"].input, hidden)
        batch.hidden = out

    def _add_mlp(self, i: int, index: int, reduced: ReducedLayer, mlp: OutputSum) -> None:
        """Sum a batch for the MLP output's refit, which must bring the compressed stream to where the original is."""
        batch = self._batches[i]
        with observe(reduced.module, {"middle": self._family.mlp_norm, "x": mlp.path}, stop_at="x") as seen:
            self._stream.run(reduced.module, index, batch, self._compressed_hidden(i))
        self._add(i, reduced, mlp, seen["x"].input, batch.hidden, seen["middle"].input)

    @torch.no_grad()
    def _add(
        self, i: int, reduced: ReducedLayer, output: OutputSum, x: Tensor, goal: Tensor, stream: Tensor
    ) -> None:
        """Sum a batch for a refit: what the linear reads, and where it should take the compressed stream and does."""
        linear, x = reduced.module.get_submodule(output.path), self._stream.cast(x)
        with self._stream.precision():
            reached = stream + linear(x)
        output.sums.add(x, goal, reached, self._held[i])

    def _refit_sum(self, reduced: ReducedLayer, path: str) -> OutputSum:
        out, width = reduced.state[f"{path}.weight"].shape
        return OutputSum(path, RefitSum(width, out, self._stream.device))

    def _replace(self, reduced: ReducedLayer, output: OutputSum) -> Refit:
        """Refit a linear of a reduced layer, in its tensors and in its module alike."""
        weight, bias = f"{output.path}.weight", f"{output.path}.bias"
        refit = output.sums.solve(Affine(reduced.state[weight], reduced.state.get(bias)))
        fitted, dtype = refit.solution, self._stream.reader.dtype
        new = {weight: fitted.weight.to(dtype)} | (
            {} if fitted.bias is None else {bias: fitted.bias.to(dtype)}
        )
        reduced.state.update(new)
        self._stream.filled(reduced.module, reduced.state)
        return refit

    def _scale(self, head: nn.Module | None) -> LogitScale | None:
        """The logits' scale, chosen on the held-out blocks, with ``head`` where the original's is reduced.

        None where the plan wants none, no block is held out or everything stays whole.
        """
        chosen = [i for i, held in enumerate(self._held) if held.any()]
        parted = self._compressed is not None or head is not None
        if not (chosen and parted and self._plan.plan.scales):
            return None
        logits = self._stream.tail()
        original = Final([self._batches[i].hidden[self._held[i]] for i in chosen], logits)
        hidden = [self._compressed_hidden(i)[self._held[i]] for i in chosen]
        compressed = Final(hidden, logits if head is None else self._stream.tail(head))
        return fit_scale(original, compressed, self._architecture.vocab)

    def _compressed_hidden(self, i: int) -> Tensor:
        return self._batches[i].hidden if self._compressed is None else self._compressed[i]

    def _part_at_embedding(self, blocks: Tensor, batch_size: int) -> None:
        """Reduce the embedding, if the plan does, and start the compressed stream from it."""
        embedding = self._outer.embedding(blocks, self._batches)
        if embedding is not None and self._refits:
            with self._watch.stage("embed"):
                batches = self._stream.embed(blocks, batch_size, embedding)
            self._compressed = [batch.hidden for batch in batches]

    def _part_streams(self) -> None:
        if self._refits and self._compressed is None:
            self._compressed = [batch.hidden for batch in self._batches]

    def _advance_original(self, layer: nn.Module, index: int) -> None:
        for batch in self._batches:
            batch.hidden = self._stream.run(layer, index, batch, batch.hidden)

    def _advance_compressed(self, layer: nn.Module, index: int) -> None:
        if self._compressed is not None:
            for i, batch in enumerate(self._batches):
                self._compressed[i] = self._stream.run(layer, index, batch, self._compressed[i])

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


def _output_path(reduced: ReducedLayer, role: str) -> str | None:
    """Path of the linear that a role's module ends in; None where its kind ends in none."""
    path = reduced.paths[role]
    module = reduced.module.get_submodule(path)
    if not isinstance(module, StructuredLinear):
        return path
    last = module.output_linear
    return next((f"{path}.{name}" for name, child in module.named_children() if child is last), None)


def _records(plan: LayerPlan, solutions: Mapping[str, Solution]) -> list[dict[str, Any]]:
    """What the manifest and the report keep of a layer's targets, but for what is measured later."""
    return [
        {
            **asdict(assignment),
            "layer": plan.index,
            "predicted": asdict(solutions[assignment.target].predicted),
            "numerics": dict(solutions[assignment.target].numerics),
        }
        for assignment in plan.assignments
    ]
