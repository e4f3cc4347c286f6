"""Factorizes what lies outside the decoder layers: the embedding, the head, or the one matrix that is both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrc.assemble import store
from lrc.checkpoint.staging import Staging
from lrc.errors import UserError
from lrc.linalg import data_error
from lrc.measure import Measured
from lrc.methods import methods
from lrc.methods.contract import Affine, EmbeddingProblem, Factors, ProjectionProblem, Solution
from lrc.methods.embedding import table_error
from lrc.modules import kinds
from lrc.modules.embedding import embedding_entry
from lrc.modules.low_rank import LowRankLinear
from lrc.modules.table import Table, build
from lrc.moments.moment import Moment, MomentSum
from lrc.plan.resolved import Assignment, ResolvedPlan
from lrc.plan.solver import find_solver
from lrc.stopwatch import Stopwatch
from lrc.stream import Batch, ModelStream


@dataclass(frozen=True)
class ReducedOuter:
    """Table entries and tensors by full path, and what the manifest and the report keep of it."""

    table: Table
    tensors: dict[str, Tensor]
    record: dict[str, Any]


class Outer:
    """The embedding and the head over one run: reduced where the plan says so, staged, and given back to be run."""

    def __init__(self, stream: ModelStream, plan: ResolvedPlan, staging: Staging, watch: Stopwatch) -> None:
        self._stream, self._staging, self._watch = stream, staging, watch
        self._architecture = stream.reader.architecture
        self._paths = stream.reader.family.outer
        self._assigned = {assignment.target: assignment for assignment in plan.outer}

    def embedding(self, blocks: Tensor, batches: Sequence[Batch]) -> nn.Module | None:
        """What takes the embedding's place, by blocks (n, length) and their ``batches`` before the first layer.

        None where it stays whole.
        """
        if "embed" not in self._assigned:
            return None
        if not self._staging.has("embed"):
            with self._watch.stage("observe"):
                final = self._final_ahead(batches) if self._architecture.tied else None
            with self._watch.stage("solve"):
                reduced = reduce_embedding(self._stream, self._assigned["embed"], blocks, final)
            self._write("embed", reduced)
        return self._module("embed", "embed")

    def head(self, batches: Sequence[Batch]) -> nn.Module | None:
        """What takes the head's place, by the original's ``batches`` behind the last layer; None where it stays whole.

        A head that is the embedding was reduced with it.
        """
        if "lm_head" not in self._assigned:
            return self._module("embed", "lm_head") if self._architecture.tied and self._assigned else None
        if not self._staging.has("lm_head"):
            with self._watch.stage("observe"):
                final = final_moment(self._stream, (batch.hidden for batch in batches))
            with self._watch.stage("solve"):
                reduced = reduce_head(self._stream, self._assigned["lm_head"], final)
            self._write("lm_head", reduced)
        return self._module("lm_head", "lm_head")

    def left(self, rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the tensors outside the layers that nothing replaces."""
        replaced = tuple(f"{self._paths[target]}." for target in self._assigned)
        return {name: tensor for name, tensor in rest.items() if not name.startswith(replaced)}

    def _final_ahead(self, batches: Sequence[Batch]) -> Moment:
        """The moment of what the head reads, by running all layers before any is reduced."""
        stream, states = self._stream, [batch.hidden for batch in batches]
        for index in range(self._architecture.layers):
            layer, _ = stream.layer(index)
            for i, batch in enumerate(batches):
                states[i] = stream.run(layer, index, batch, states[i])
        return final_moment(stream, states)

    def _write(self, part: str, reduced: ReducedOuter) -> None:
        with self._watch.stage("write"):
            self._staging.write(part, reduced.tensors, {"table": reduced.table, "results": [reduced.record]})

    def _module(self, part: str, target: str) -> nn.Module:
        """The module of a staged part that stands for a target, as saved; a tied head has the embedding's tensors."""
        with torch.device("meta"):
            module = build(self._staging.record(part)["table"][self._paths[target]], torch.empty(0))
        start = f"{self._paths[part]}."
        tensors = self._staging.tensors(part).items()
        state = {name.removeprefix(start): tensor for name, tensor in tensors if name.startswith(start)}
        return self._stream.filled(module, state)


def reduce_embedding(
    stream: ModelStream, assignment: Assignment, blocks: Tensor, final: Moment | None
) -> ReducedOuter:
    """Factorize the embedding by how often tokens are in ``blocks`` (n, length).

    ``final``: the moment of what the head reads, where it has the same weight; the head then shares the factors.
    """
    family, dtype = stream.reader.family, stream.reader.dtype
    path, head = family.embedding, family.head
    weight = stream.reader.rest()[f"{path}.weight"].to(stream.device)
    counts = torch.bincount(blocks.flatten(), minlength=len(weight)).to(stream.device, torch.float64)
    seen = (counts + 1) / (counts.sum() + len(counts))  # one more of each, as others come in other texts
    solution = _solve(EmbeddingProblem(weight, seen, final), assignment)
    part = solution.parts["embed"]
    assert isinstance(part, Factors)
    a, b = (part.tensors[name].to(dtype) for name in ("A", "B"))
    rank, width = a.shape
    table: Table = {path: embedding_entry(len(b), width, rank)}
    tensors = {f"{path}.weight": a.new_empty(0), f"{path}.A.weight": a, f"{path}.B.weight": b}
    if final is not None:
        table[head] = LowRankLinear.entry({"A": a, "B": b}, bias=False)
        tensors[f"{head}.weight"] = a.new_empty(0)
    met = EmbeddingProblem(weight, counts / counts.sum(), final)
    error = table_error(met, weight.double() - b.double() @ a.double())
    record = _record(assignment, solution, Measured(error.error, error.reference))
    return ReducedOuter(table, tensors, record)


def reduce_head(stream: ModelStream, assignment: Assignment, final: Moment) -> ReducedOuter:
    """Factorize a head of its own, by the moment of what it reads."""
    head, dtype = stream.reader.family.head, stream.reader.dtype
    weight = stream.reader.rest()[f"{head}.weight"].to(stream.device)
    solution = _solve(ProjectionProblem("lm_head", Affine(weight), final), assignment)
    part = solution.parts["lm_head"]
    assert isinstance(part, Factors)
    entry, tensors = store(part, dtype)
    factors = {name: tensor.to(dtype).double() for name, tensor in part.tensors.items()}
    delta = weight.double() - kinds()[part.kind].dense(factors)
    measured = Measured(data_error(delta, final.second), data_error(weight, final.second))
    named = {f"{head}.{name}": tensor for name, tensor in tensors.items()}
    return ReducedOuter({head: entry}, named, _record(assignment, solution, measured))


@torch.no_grad()
def final_moment(stream: ModelStream, states: Iterable[Tensor]) -> Moment:
    """The moment of what the head reads, from hidden states behind the last layer. UserError for NaN or inf in it."""
    norm, total = stream.final_norm(), MomentSum(stream.reader.architecture.hidden, stream.device)
    for hidden in states:
        with stream.precision():
            total.add(stream.cast(norm(hidden)))
    moment = total.moment()
    if not bool(moment.second.diagonal().isfinite().all()):
        raise UserError("the hidden states behind the last layer are NaN or inf")
    return moment


def _solve(problem: EmbeddingProblem | ProjectionProblem, assignment: Assignment) -> Solution:
    solver: Any = find_solver(methods()[assignment.method], assignment.target)
    return solver.solve(problem, assignment.size, **assignment.options)


def _record(assignment: Assignment, solution: Solution, measured: Measured) -> dict[str, Any]:
    return {
        **asdict(assignment),
        "layer": None,
        "predicted": asdict(solution.predicted),
        "numerics": dict(solution.numerics),
        "measured": asdict(measured),
    }
