"""What a method is: pure functions from a problem and a size to a solution, one for each thing it solves.

Problems hold canonical (out, in) unfused float weights, the statistics asked for and head geometry; no names, no
paths, no modules.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_type_hints

from torch import Tensor

from lrc.families import Heads, Target
from lrc.methods.sizes import SizeRule
from lrc.modules.kind import Factors
from lrc.moments.moment import Moment

Metric = Literal["weight", "data", "loss"]


@dataclass(frozen=True)
class Affine:
    """One projection: ``weight`` (out, in) and ``bias`` (out,) or None."""

    weight: Tensor
    bias: Tensor | None = None


# What the statistics that a solver names found for its target, by name.
Statistics = Mapping[str, Any]


@dataclass(frozen=True)
class ProjectionProblem:
    """One matrix, the moment of its input and, where gradients are used, G = E[g gᵀ] (out, out) of its output."""

    role: str
    matrix: Affine
    input: Moment
    gradient: Tensor | None = None
    statistics: Statistics = field(default_factory=dict)


@dataclass(frozen=True)
class EmbeddingProblem:
    """The rows of the embedding (tokens, hidden), the share of the text that each token has (tokens,) and, where the
    head has the same weight, the moment of the final hidden state that it reads.
    """

    table: Tensor
    frequency: Tensor
    final: Moment | None = None


@dataclass(frozen=True)
class QKProblem:
    """Queries and keys of one layer, and the moment of the input that both read.

    ``gradient``, where asked for, is of the loss: with rotary positions the Gram matrix (kv_heads, D/2, D/2) of pairs,
    a_j = q_j·∂L/∂q_j summed over the queries that share a key, else E[γ γᵀ] (kv_heads, D, D) of γ = ∂L/∂q, summed over
    the query heads that share a key.
    """

    q: Affine
    k: Affine
    heads: Heads
    input: Moment
    gradient: Tensor | None = None
    statistics: Statistics = field(default_factory=dict)


@dataclass(frozen=True)
class OVProblem:
    """Values and output projection of one layer, the moment of its input and, where asked for, G of its output."""

    v: Affine
    o: Affine
    heads: Heads
    output: Moment
    gradient: Tensor | None = None
    statistics: Statistics = field(default_factory=dict)


@dataclass(frozen=True)
class MLPProblem:
    """The projections into the hidden state by role, the one out of it, the hidden state's moment and, where asked for,
    G of the output.
    """

    inputs: Mapping[str, Affine]
    output_role: str
    output: Affine
    hidden: Moment
    gradient: Tensor | None = None
    statistics: Statistics = field(default_factory=dict)


Problem = ProjectionProblem | EmbeddingProblem | QKProblem | OVProblem | MLPProblem


@dataclass(frozen=True)
class Prediction:
    """A squared error and the squared size of what it is an error of, both means over tokens, in the metric named.

    ``metric``: ``output`` (E‖Δy‖² at the projection, OV or MLP output), ``scores`` (attention scores, before their
    scale), ``kl`` (divergence of the attention distribution in nats, mean over queries and heads) or ``loss`` (rise of
    the loss in nats). ``loss``: the predicted rise of the loss in nats, where the method has gradients; of an output
    ½ tr(G ΔW C ΔWᵀ).
    """

    error: float
    reference: float
    metric: Literal["output", "scores", "kl", "loss"]
    loss: float | None = None

    @property
    def relative(self) -> float:
        """(E‖Δy‖² / E‖y‖²)^½."""
        return (self.error / self.reference) ** 0.5 if self.reference > 0 else 0.0


@dataclass(frozen=True)
class Solution:
    """New projections by role, the predicted error, and what the numerics needed.

    ``rotary_columns`` (kv_heads, rank): kept columns of every key head, first halves then second halves.
    ``neurons`` (rank,): kept hidden dimensions of the MLP. ``numerics``: damping added, eigenvalues raised.
    """

    parts: Mapping[str, Affine | Factors]
    predicted: Prediction
    rotary_columns: Tensor | None = None
    neurons: Tensor | None = None
    numerics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Shapes:
    """What is known of a problem before its tensors are there: the target and the head geometry.

    ``sampled``: elements of the covariances that go with the sampled queries of one key head.
    """

    target: Target
    heads: Heads
    sampled: int = 0


# (problem, size, *, options) -> Solution; the keyword-only parameters are the options a plan may set.
SolveFunction = Callable[..., Solution]
Refusal = Callable[[Heads, Mapping[str, Any]], str | None]
# (shapes, size, options) -> bytes of the float64 working set of a solve, beside the problem and the solution.
Memory = Callable[[Shapes, Any, Mapping[str, Any]], int]


def moment_copies(shapes: Shapes, size: Any, options: Mapping[str, Any]) -> int:
    """Return the bytes of a few float64 copies of the largest moment and of the weights, and a root of each."""
    inputs, outputs = (
        max(getattr(matrix, side) for matrix in shapes.target.matrices.values())
        for side in ("columns", "rows")
    )
    return 8 * (4 * inputs**2 + 4 * shapes.target.parameters + 5 * min(inputs, outputs) ** 2)


@dataclass(frozen=True)
class Option:
    """One option of a solver: the type its value must have and the value it has unless a plan sets it."""

    annotation: Any
    default: Any


@dataclass(frozen=True)
class Solver:
    """One function of a method with what the planner must know of it.

    ``target``: ``projection``, ``embed``, ``qk``, ``ov`` or ``mlp``. ``needs``: statistics in ``lrc.moments``, and
    ``option_needs`` those that a value of an option brings along. ``metric``: what the method minimises. ``exact``: at
    full size it gives the map back. ``refuses``: says why it cannot do a family with these options. ``rotary``: the
    method that takes a component's projections one by one where positions are rotary and no entry names the component.
    ``memory``: what a solve takes.
    """

    solve: SolveFunction
    target: str
    size: SizeRule
    needs: tuple[str, ...]
    option_needs: Mapping[tuple[str, Any], str]
    metric: Metric
    exact: bool
    paper: str
    refuses: Refusal
    rotary: str | None
    memory: Memory

    @property
    def options(self) -> dict[str, Option]:
        """The keyword-only parameters of the function."""
        hints = get_type_hints(self.solve, include_extras=True)
        parameters = inspect.signature(self.solve).parameters.values()
        return {p.name: Option(hints[p.name], p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}

    def collectors(self, options: Mapping[str, Any]) -> set[str]:
        """What has to be collected to solve with these options."""
        brought = {name for (key, value), name in self.option_needs.items() if options.get(key) == value}
        return {*self.needs, *brought}


@dataclass(frozen=True)
class Method:
    """A method by its file's name: what it says of itself in one line, and its solvers by target."""

    name: str
    summary: str
    solvers: Mapping[str, Solver]

    def solver(self, target: str) -> Solver | None:
        """What solves a target; an embedding is looked up, so no solver of projections will do for it."""
        return self.solvers.get(target) or (None if target == "embed" else self.solvers.get("projection"))


def solves(
    target: Literal["projection", "embed", "qk", "ov", "mlp"],
    *,
    size: SizeRule,
    needs: tuple[str, ...] = ("moments",),
    option_needs: Mapping[tuple[str, Any], str] = MappingProxyType({}),
    metric: Metric = "data",
    exact: bool = True,
    paper: str,
    refuses: Refusal = lambda heads, options: None,
    rotary: str | None = None,
    memory: Memory = moment_copies,
) -> Callable[[SolveFunction], SolveFunction]:
    """Mark a function as a method's solver of one target; the folder scan finds it."""

    def mark(function: SolveFunction) -> SolveFunction:
        solver = Solver(
            function, target, size, needs, option_needs, metric, exact, paper, refuses, rotary, memory
        )
        function.solver = solver  # type: ignore[attr-defined]
        return function

    return mark
