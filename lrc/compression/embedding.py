"""Factorize the embedding and the LM head, or the one matrix of both if they are tied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lrc.checkpoint.staging import SharedStaging, Staging
from lrc.compression.assemble import store
from lrc.compression.measure import Measured, target_record
from lrc.compression.solve import solve
from lrc.errors import UserError
from lrc.maths.linalg import data_error
from lrc.methods.contract import Affine, EmbeddingProblem, Factors, ProjectionProblem, Solution
from lrc.methods.shared.pairs import table_error
from lrc.modules.low_rank import EMBEDDING, LowRankLinear
from lrc.modules.table import Table, build
from lrc.moments.moment import Moment, MomentSum
from lrc.plan.resolved import ResolvedPlan
from lrc.run.stopwatch import Stopwatch
from lrc.walk.stream import Batch, ModelStream, below
from lrc.walk.walk import Walk

OuterProblem = EmbeddingProblem | ProjectionProblem


@dataclass(frozen=True)
class ReducedOuter:
    """A target as stored: table entries and tensors by full path. A tied head is part of ``embed``."""

    target: str
    table: Table
    tensors: Mapping[str, Tensor]

    def module(self, stream: ModelStream, target: str) -> nn.Module | None:
        """Return the module that replaces ``target``, or None if this reduction leaves it unchanged."""
        paths = stream.reader.family.outer
        if paths[target] not in self.table:
            return None
        with torch.device("meta"):
            module = build(self.table[paths[target]], torch.empty(0))
        # A tied head has the embedding's tensors.
        return stream.filled(module, below(self.tensors, paths[self.target]))


class TableCompressor:
    """Compress the embedding and the LM head, stage them, and return modules to run.

    Rank 0 solves; the other processes load its result from the staging folder.
    """

    def __init__(
        self,
        stream: ModelStream,
        plan: ResolvedPlan,
        staging: Staging | SharedStaging,
        watch: Stopwatch,
    ) -> None:
        self._stream, self._staging, self._watch = stream, staging, watch
        self._architecture = stream.reader.architecture
        self._assigned = {assignment.target: assignment for assignment in plan.outer}

    def embedding(self, blocks: Tensor, batches: Sequence[Batch]) -> nn.Module | None:
        """Return the reduced embedding, or None if it stays whole.

        ``blocks`` (n, length) are of all processes; ``batches`` are this process's, at the first layer's input.
        """
        if "embed" not in self._assigned:
            return None
        if not self._staging.has("embed"):
            with self._watch.stage("observe"):
                final = self._final_ahead(batches) if self._architecture.tied else None
            self._compress("embed", final, blocks)
        return self._staged("embed").module(self._stream, "embed")

    def head(self, batches: Sequence[Batch]) -> nn.Module | None:
        """Return the reduced head, or None if it stays whole; ``batches`` are the original's last hidden states.

        A tied head was reduced with the embedding.
        """
        if "lm_head" not in self._assigned:
            tied = self._architecture.tied and "embed" in self._assigned
            return self._staged("embed").module(self._stream, "lm_head") if tied else None
        if not self._staging.has("lm_head"):
            with self._watch.stage("observe"):
                final = final_moment(self._stream, (batch.hidden for batch in batches))
            self._compress("lm_head", final)
        return self._staged("lm_head").module(self._stream, "lm_head")

    def unreplaced(self, rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of ``rest`` that no reduction replaces."""
        replaced = tuple(f"{self._stream.reader.family.outer[target]}." for target in self._assigned)
        return {name: tensor for name, tensor in rest.items() if not name.startswith(replaced)}

    def _final_ahead(self, batches: Sequence[Batch]) -> Moment:
        """Run all original layers and return the moment of the head's inputs."""
        ahead = [replace(batch) for batch in batches]
        for visit in Walk(self._stream, ahead):
            visit.observe()
        return final_moment(self._stream, (batch.hidden for batch in ahead))

    def _compress(self, target: str, final: Moment | None, blocks: Tensor | None = None) -> None:
        """Solve a target, measure the stored result on the calibration text and stage it, on rank 0 alone."""
        stream, assignment = self._stream, self._assigned[target]
        if not stream.processes.first:
            self._staging.write(target, {}, {})  # rank 0 stores the part
            return
        with self._watch.stage("solve"):
            problem = _problem(stream, target, final, blocks)
            solution = solve(problem, assignment)
            if isinstance(problem, EmbeddingProblem) and blocks is not None:
                problem = replace(problem, frequency=_shares(blocks, problem.table))
            measured = _measured(problem, _factors(solution))
            reduced = store_outer(stream, solution)
        with self._watch.stage("write"):
            record = {
                "table": reduced.table,
                "results": [target_record(assignment, None, solution, measured)],
            }
            self._staging.write(target, reduced.tensors, record)

    def _staged(self, target: str) -> ReducedOuter:
        return ReducedOuter(target, self._staging.record(target)["table"], self._staging.tensors(target))


def make_outer_problems(
    stream: ModelStream, targets: Iterable[str], blocks: Tensor, batches: Iterable[Batch]
) -> dict[str, OuterProblem]:
    """Return the problems of ``targets``, from blocks (n, length) and their last hidden states ``batches``."""
    final = final_moment(stream, (batch.hidden for batch in batches))
    return {target: _problem(stream, target, final, blocks) for target in targets}


def _problem(stream: ModelStream, target: str, final: Moment | None, blocks: Tensor | None) -> OuterProblem:
    """Return the problem of a target, from the moment ``final`` of the head's inputs and blocks (n, length).

    The embedding is weighted by the frequency of tokens; with a tied head the two share factors.
    """
    weight = stream.reader.rest()[f"{stream.reader.family.outer[target]}.weight"].to(stream.device)
    if blocks is None or target == "lm_head":
        assert final is not None
        return ProjectionProblem("lm_head", Affine(weight), final)
    extra = torch.arange(len(weight))  # one more of each, for tokens that only other texts have
    frequency = _shares(torch.cat([blocks.flatten(), extra]), weight)
    return EmbeddingProblem(weight, frequency, final if stream.reader.architecture.tied else None)


def store_outer(stream: ModelStream, solution: Solution) -> ReducedOuter:
    """Return a solution as stored, in the precision of what it replaces."""
    ((target, _),) = solution.parts.items()
    family, part = stream.reader.family, _factors(solution)
    path, head = family.outer[target], family.head
    dtype = stream.reader.tensors[f"{path}.weight"].dtype
    if target == "lm_head":
        entry, stored = store(part, dtype)
        return ReducedOuter(target, {path: entry}, {f"{path}.{name}": t for name, t in stored.items()})
    a, b = (part.tensors[name].to(dtype) for name in ("A", "B"))
    rank, width = a.shape
    table: Table = {path: {"kind": EMBEDDING, "tokens": len(b), "width": width, "rank": rank}}
    if (factor := stream.reader.architecture.embedding_factor) != 1:
        table[path]["factor"] = factor
    tensors = {f"{path}.weight": a.new_empty(0), f"{path}.A.weight": a, f"{path}.B.weight": b}
    if stream.reader.architecture.tied:
        table[head] = LowRankLinear.entry({"A": a, "B": b}, bias=False)
        tensors[f"{head}.weight"] = a.new_empty(0)
    return ReducedOuter(target, table, tensors)


@torch.no_grad()
def final_moment(stream: ModelStream, states: Iterable[Tensor]) -> Moment:
    """Return the moment of the head's inputs over all processes, from the last layer's outputs.

    Raises UserError for NaN or inf.
    """
    norm, total = stream.final_norm(), MomentSum(stream.reader.architecture.hidden, stream.device)
    for hidden in states:
        with stream.precision():
            total.add(norm(stream.fetch(hidden)).to(stream.dtype))
    total.reduce(stream.processes)
    moment = total.moment()
    if not bool(moment.second.diagonal().isfinite().all()):
        raise UserError("the hidden states after the last layer are NaN or inf")
    return moment


def _shares(ids: Tensor, table: Tensor) -> Tensor:
    """Return each row's share of ids (rows,), in float64 on the table's device."""
    counts = torch.bincount(ids.flatten(), minlength=len(table)).to(table.device, torch.float64)
    return counts / counts.sum()


def _factors(solution: Solution) -> Factors:
    (part,) = solution.parts.values()
    assert isinstance(part, Factors)
    return part


def _measured(problem: OuterProblem, part: Factors) -> Measured:
    """Return the error of factors as stored."""
    whole = problem.table if isinstance(problem, EmbeddingProblem) else problem.matrix.weight
    part = part.to(whole.dtype).to(torch.float64)
    if isinstance(problem, EmbeddingProblem):
        factors = part.tensors
        error = table_error(problem, problem.table.double() - factors["B"] @ factors["A"])
        return Measured(error.error, error.reference)
    weight, second = problem.matrix.weight, problem.input.second
    delta = weight.double() - part.dense
    return Measured(data_error(delta, second), data_error(weight, second))
