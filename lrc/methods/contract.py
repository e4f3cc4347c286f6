"""Define a method: pure functions that turn a problem and a size into a solution, one function for each target.

A problem holds unfused (out, in) float weights, the requested statistics and head geometry; no paths, no modules.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, get_type_hints

from torch import Tensor

from lrc.families import Heads, Target
from lrc.methods.sizes import SizeRule
from lrc.modules.kind import Factors
from lrc.moments.moment import Moment

Metric = Literal["weight", "data", "loss"]


@dataclass(frozen=True)
class Affine:
    """Hold one projection: ``weight`` (out, in) and ``bias`` (out,) or None."""

    weight: Tensor
    bias: Tensor | None = None


# The statistics that a solver requests for its target, by name.
Statistics = Mapping[str, Any]


@dataclass(frozen=True)
class ProjectionProblem:
    """Hold one matrix, the moment of its input and, with gradients, G = E[g gᵀ] (out, out) of its output."""

    role: str
    matrix: Affine
    input: Moment
    gradient: Tensor | None = None
    statistics: Statistics = field(default_factory=dict)


@dataclass(frozen=True)
class EmbeddingProblem:
    """Hold the embedding (tokens, hidden), each token's share of the text (tokens,) and, with a tied head, the moment
    of the final hidden state.
    """

    table: Tensor
    frequency: Tensor
    final: Moment | None = None


@dataclass(frozen=True)
class QKProblem:
    """Hold the query and key projections of one layer, and the moment of their input.

    ``gradient``, if requested: E[γ γᵀ] (kv_heads, D, D) of γ = ∂L/∂q, summed over the query heads of a key head. With
    rotary positions, E[a aᵀ] (kv_heads, D/2, D/2), where a_j sums q_j·∂L/∂q_j of pair j over these heads.
    """

    q: Affine
    k: Affine
    heads: Heads
    input: Moment
    gradient: Tensor | None = None
    statistics: Statistics = field(default_factory=dict)


@dataclass(frozen=True)
class OVProblem:
    """Hold the value and output projections of a layer, the moment of o's input and, if asked, G of its output."""

    v: Affine
    o: Affine
    heads: Heads
    output: Moment
    gradient: Tensor | None = None
    statistics: Statistics = field(default_factory=dict)


@dataclass(frozen=True)
class MLPProblem:
    """Hold the MLP's input projections by role, its output projection, the moment of its hidden state and, if
    requested, G of its output.
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
    """Hold a squared error and the square of the exact value, both means over tokens, in the metric named.

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
        """Return (E‖Δy‖² / E‖y‖²)^½."""
        return (self.error / self.reference) ** 0.5 if self.reference > 0 else 0.0


@dataclass(frozen=True)
class Solution:
    """Hold the new projections by role and the predicted error.

    ``rotary_columns`` (kv_heads, rank): kept columns of every key head, first halves then second halves.
    ``numerics``: values such as the damping added.
    """

    parts: Mapping[str, Affine | Factors]
    predicted: Prediction
    rotary_columns: Tensor | None = None
    numerics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Shapes:
    """Hold the target and head geometry of a problem whose tensors are not loaded.

    ``sampled``: elements of the covariances of the sampled queries of one key head.
    """

    target: Target
    heads: Heads
    sampled: int = 0


# (problem, size, *, options) -> Solution; a plan may set the keyword-only parameters.
SolveFunction = Callable[..., Solution]
Refusal = Callable[[Heads, Mapping[str, Any]], str | None]
# (shapes, size, options) -> bytes of the float64 working set of a solve, without the problem and the solution.
Memory = Callable[[Shapes, Any, Mapping[str, Any]], int]


def moment_copies(shapes: Shapes, size: Any, options: Mapping[str, Any]) -> int:
    """Return the bytes of a few float64 copies and a root of the largest moment and of the weights."""
    inputs, outputs = (
        max(getattr(matrix, side) for matrix in shapes.target.matrices.values())
        for side in ("columns", "rows")
    )
    return 8 * (4 * inputs**2 + 4 * shapes.target.parameters + 5 * min(inputs, outputs) ** 2)


@dataclass
class Solver:
    """Hold one function of a method with what planning needs; as a decorator, ``@solves(...)`` marks the function.

    ``needs``: statistics in ``lrc.moments``; ``option_needs``: those that an option's value adds. ``metric``: what the
    method minimises. ``exact``: at full size the solution equals the original map. ``refuses``: returns why a family
    with these options is unsupported, or None. ``memory``: returns the bytes of a solve. ``rotary``: with rotary
    positions, or where the component cannot shrink as a whole, the method for each of its projections, unless the plan
    names the component.
    """

    target: Literal["projection", "embed", "qk", "ov", "mlp"]
    _: KW_ONLY
    size: SizeRule
    paper: str
    needs: tuple[str, ...] = ("moments",)
    option_needs: Mapping[tuple[str, Any], str] = field(default_factory=dict)
    metric: Metric = "data"
    exact: bool = True
    refuses: Refusal = lambda heads, options: None
    rotary: str | None = None
    memory: Memory = moment_copies
    solve: SolveFunction = field(init=False)

    def __call__(self, function: SolveFunction) -> SolveFunction:
        """Mark a function as a method's solver of the target; the folder scan finds it."""
        self.solve = function
        function.solver = self  # type: ignore[attr-defined]
        return function

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """Return the options by name: the function's keyword-only parameters."""
        hints = get_type_hints(self.solve, include_extras=True)
        parameters = inspect.signature(self.solve).parameters.values()
        own = (p for p in parameters if p.kind is p.KEYWORD_ONLY)
        return {p.name: p.replace(annotation=hints[p.name]) for p in own}

    def collectors(self, options: Mapping[str, Any]) -> set[str]:
        """Return the names of the statistics that these options need."""
        brought = {name for (key, value), name in self.option_needs.items() if options.get(key) == value}
        return {*self.needs, *brought}


solves = Solver


@dataclass(frozen=True)
class Method:
    """Hold a method: the name of its file, the first line of its docstring, and its solvers by target."""

    name: str
    summary: str
    solvers: Mapping[str, Solver]

    def solver(self, target: str) -> Solver | None:
        """Return the solver of a target, else of projections; an embedding is a lookup and needs its own solver."""
        return self.solvers.get(target) or (None if target == "embed" else self.solvers.get("projection"))
