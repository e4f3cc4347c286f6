"""Check the options of an inspection, list the methods and sizes that apply, and predict their errors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from lrc.compression.solve import solve
from lrc.errors import UserError, nearest
from lrc.families import Architecture, Target
from lrc.methods import Method, methods
from lrc.methods.contract import Affine, Factors, Prediction, Problem, Solver
from lrc.modules import kinds
from lrc.modules.low_rank import EMBEDDING
from lrc.moments import collectors
from lrc.moments.gradient import GRADIENTS
from lrc.plan.precedence import COMPONENTS
from lrc.plan.resolved import Assignment, LayerPlan
from lrc.plan.schema import Calibration, Plan, matched_layers
from lrc.records.inspection import Estimate, Unit

TABLE_COLLECTORS = frozenset({"moments"})  # what is collected outside the layers


@dataclass(frozen=True)
class Candidate:
    """An assignment at the method's size nearest to the fraction ``keep``."""

    keep: float
    assignment: Assignment

    def estimate(self, problem: Problem) -> Estimate:
        """Solve a problem and return the predicted error."""
        one = self.assignment
        solution = solve(problem, one)
        error, unit = figure(solution.predicted)
        return Estimate(
            keep=self.keep,
            method=one.method,
            options=dict(one.options),
            size=one.size,
            kept=one.kept,
            whole=one.whole,
            error=error,
            unit=unit,
            loss=solution.predicted.loss,
            steps=sum(map(_steps, solution.parts.values())),
        )


@dataclass(frozen=True)
class Selection:
    """Hold the layers, the targets ``inside`` and ``outside`` of them, and by target the candidates to estimate."""

    architecture: Architecture
    methods: Mapping[str, Method]
    keeps: Sequence[float]
    layers: list[int]
    inside: list[Target]
    outside: list[Target]
    candidates: Mapping[str, list[Candidate]]

    @property
    def plans(self) -> tuple[LayerPlan, ...]:
        """All candidates of the targets, for each layer."""
        chosen = tuple(one.assignment for target in self.inside for one in self.candidates[target.name])
        return tuple(LayerPlan(index, chosen) for index in self.layers)


def select(
    architecture: Architecture,
    keeps: Sequence[float],
    layers: str | None,
    names: Sequence[str] | None,
    method_names: Sequence[str] | None,
    *,
    tables: bool,
    gradients: bool,
) -> Selection:
    """Find the layers, targets and candidates of an inspection; None stands for all.

    Raises UserError for an unknown layer, target or method.
    """
    known = methods()
    for name in method_names or ():
        if name not in known:
            raise UserError(f"--methods {name}: there is no such method; {nearest(name, known)}")
    known = {name: method for name, method in known.items() if method_names is None or name in method_names}
    chosen = set(range(architecture.layers))
    if layers is not None:
        try:
            chosen = matched_layers(layers, architecture.layers)
        except ValueError as error:
            raise UserError(f"--layers {layers}: {error}") from None
    there = architecture.targets | architecture.outer
    for name in names or ():
        if name == "lm_head" and architecture.tied:
            raise UserError(
                "--targets lm_head: the head of this model is tied to its embedding; name embed for both"
            )
        if why := architecture.closed.get(name):
            raise UserError(f"--targets {name}: its heads cannot be narrowed: {why}; name its projections")
        if name not in there:
            model = architecture.family.model_type
            raise UserError(f"--targets {name}: {model} has no target {name!r}; {nearest(name, there)}")
    inside = [t for name, t in architecture.targets.items() if names is None or name in names]
    outside = [t for name, t in architecture.outer.items() if (tables if names is None else name in names)]
    collected = collectors() if gradients else collectors() - {GRADIENTS}
    found = candidates(architecture, inside, known, keeps, collected)
    found |= candidates(architecture, outside, known, keeps, TABLE_COLLECTORS)
    layers_chosen = sorted(chosen) if inside else []
    return Selection(architecture, known, keeps, layers_chosen, inside, outside, found)


def base_plan(architecture: Architecture, samples: int, seq_len: int | None, *, gradients: bool) -> Plan:
    """Return a plan whose solvers read moments at all sites, and ``gradients`` of all projections if asked for."""
    if seq_len is not None and not 2 <= seq_len <= architecture.positions:
        raise UserError(
            f"--seq-len {seq_len}: the model reads 2 to {architecture.positions} tokens at once; the nearest is "
            f"{min(max(seq_len, 2), architecture.positions)}"
        )
    calibration = Calibration(samples=samples, gradient_samples=samples, seq_len=seq_len)
    return Plan(method="two_sided_svd" if gradients else "whitened_svd", calibration=calibration)


def candidates(
    architecture: Architecture,
    targets: Iterable[Target],
    methods: Mapping[str, Method],
    keeps: Sequence[float],
    collectors: Collection[str],
) -> dict[str, list[Candidate]]:
    """Return by target every legal size that saves weights, of every method that can solve it with ``collectors``."""
    found: dict[str, list[Candidate]] = {}
    for target in targets:
        listed = found[target.name] = []
        for name, method in methods.items():
            solver = method.solver(target.name)
            if solver is None or (target.name in COMPONENTS and solver.target == "projection"):
                continue
            options, rule = able_options(solver, collectors), solver.size
            if options is None or solver.refuses(architecture.geometry, options):
                continue
            for keep in keeps:
                size = rule.nearest(target, keep, options)
                if rule.refusal(target, size, options):
                    continue
                if (kept := rule.weights(target, size, options)) < target.parameters:
                    one = Assignment(target.name, name, size, options, kept, target.parameters)
                    listed.append(Candidate(keep, one))
    return found


def able_options(solver: Solver, collectors: Collection[str]) -> dict[str, Any] | None:
    """Return options with which a solver needs no more than ``collectors``, defaults first; None if there are none."""
    if not set(solver.needs) <= set(collectors):
        return None
    options: dict[str, Any] = {}
    for name, option in solver.options.items():
        values = (option.default, *get_args(option.annotation))
        able = (value for value in values if solver.option_needs.get((name, value)) in (None, *collectors))
        if (found := next(able, None)) is None:
            return None
        options[name] = found
    return options


def figure(prediction: Prediction) -> tuple[float, Unit]:
    """Return a prediction as one number, and its unit."""
    if prediction.metric == "kl":
        return prediction.error, "nats KL"
    if prediction.metric == "loss":
        return prediction.error, "nats of loss"
    unit: Unit = "relative error of scores" if prediction.metric == "scores" else "relative error"
    return prediction.relative, unit


def _steps(part: Affine | Factors) -> int:
    """Return the matrix products and permutations that a token goes through; an embedding is a look-up and one."""
    if isinstance(part, Affine):
        return 1
    return 2 if part.kind == EMBEDDING else kinds()[part.kind].steps
