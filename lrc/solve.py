"""Poses a layer's problems from its weights and moments, and has the plan's methods solve them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from lrc.collect import LayerSums, Statistics
from lrc.families import Architecture, canonical
from lrc.gradients import gradient_moments
from lrc.methods import methods
from lrc.methods.contract import (
    Affine,
    MLPProblem,
    OVProblem,
    Problem,
    ProjectionProblem,
    QKProblem,
    Solution,
    Solver,
)
from lrc.moments.gradient import GradientMoment, Wanted
from lrc.moments.observe import observe
from lrc.plan.resolved import Assignment, LayerPlan, ResolvedPlan
from lrc.plan.schema import Calibration
from lrc.plan.solver import find_solver
from lrc.ranks import ALONE, Ranks
from lrc.stream import Batch, ModelStream
from lrc.text.blocks import gradient_blocks

# The moment that a component's problem is posed on; a projection's is that of its own input.
COMPONENT_SITES = {"qk": "attn_in", "ov": "o_in", "mlp": "down_in"}


def collectors_needed(plan: LayerPlan) -> set[str]:
    """Statistics that the solvers of a layer read."""
    return {name for a in plan.assignments for name in solver_of(a).collectors(a.options)}


def sites_needed(architecture: Architecture, plan: LayerPlan) -> set[str]:
    """Sites whose moments the solvers of a layer read."""
    return {site_of(architecture, a.target) for a in plan.assignments}


def site_of(architecture: Architecture, target: str) -> str:
    """The site whose moment a target's problem is posed on."""
    return COMPONENT_SITES.get(target) or architecture.family.site(target)


def gradients_needed(architecture: Architecture, plan: LayerPlan, *, losses: bool = False) -> Wanted:
    """Gradient moments that the solvers of a layer read; with ``losses``, all that they can predict a loss from."""
    targets = {
        a.target for a in plan.assignments if losses or "gradients" in solver_of(a).collectors(a.options)
    }
    outputs = {"ov": "o", "mlp": architecture.family.mlp_output}
    return Wanted(frozenset(outputs.get(target, target) for target in targets - {"qk"}), "qk" in targets)


def reads_gradients(architecture: Architecture, plan: ResolvedPlan) -> bool:
    """Whether any layer's solvers read gradients."""
    return any(gradients_needed(architecture, layer) for layer in plan.layers)


def read_gradients(
    stream: ModelStream,
    plans: Iterable[LayerPlan],
    calibration: Calibration,
    blocks: Tensor,
    batch_size: int,
    *,
    losses: bool = False,
    held: Callable[[int], nn.Module] | None = None,
) -> dict[int, GradientMoment]:
    """The gradient moments that layers' solvers read, where states wait, by layer; none where no solver reads any.

    They are of the calibration blocks (n, tokens) that its settings choose. ``losses`` and ``held`` are those of
    ``gradients_needed`` and of the sweep, which runs the layers that ``held`` gives.
    """
    architecture = stream.reader.architecture
    wanted = {plan.index: gradients_needed(architecture, plan, losses=losses) for plan in plans}
    wanted = {index: want for index, want in wanted.items() if want}
    if not wanted:
        return {}
    chosen = gradient_blocks(blocks, calibration.gradient_samples, calibration.seed)
    return gradient_moments(stream, chosen, wanted, batch_size, calibration.seed, layer=held)


def layer_sums(
    stream: ModelStream,
    plan: LayerPlan,
    layer: nn.Module,
    state: Mapping[str, Tensor],
    first_token: int,
    sites: Collection[str] = (),
) -> LayerSums:
    """What a layer's solvers read of its activations, and the moments at ``sites`` beside; nothing counted yet.

    The first token of a block counts as ``first_token`` in moments.
    """
    needed, collectors = sites_needed(stream.reader.architecture, plan), collectors_needed(plan)
    return LayerSums(stream, plan, layer, state, needed.union(sites), collectors, first_token)


def read_statistics(
    stream: ModelStream,
    plan: LayerPlan,
    layer: nn.Module,
    state: Mapping[str, Tensor],
    batches: Sequence[Batch],
    gradients: GradientMoment | None,
    first_token: int,
    sites: Collection[str] = (),
) -> Statistics:
    """What ``layer_sums`` counts, from a run of the original on all batches, and what a sweep found.

    The batches stay where they are. Raises UserError where activations are NaN or inf.
    """
    sums = layer_sums(stream, plan, layer, state, first_token, sites)
    for batch, (hidden,) in zip(batches, stream.passing(batch.hidden for batch in batches), strict=True):
        with observe(layer, sums.watched) as calls:
            stream.run(layer, plan.index, batch, hidden)
        sums.add(calls)
    return sums.results(gradients)


def solve_layer(
    architecture: Architecture,
    plan: LayerPlan,
    state: Mapping[str, Tensor],
    statistics: Statistics,
    ranks: Ranks = ALONE,
) -> dict[str, Solution]:
    """Solve everything a plan asks of one layer, by target, from its tensors and statistics.

    Each is solved by one process, so that all have the same to the bit.
    """

    def solution(assignment: Assignment) -> Solution:
        return solve(pose(architecture, assignment.target, state, statistics), assignment)

    targets = [assignment.target for assignment in plan.assignments]
    return dict(zip(targets, ranks.spread(plan.assignments, solution), strict=True))


def solve(problem: Problem, assignment: Assignment) -> Solution:
    """Solve one problem as an assignment asks."""
    return solver_of(assignment).solve(problem, assignment.size, **assignment.options)


def solver_of(assignment: Assignment) -> Solver:
    """The function of its method that solves an assignment."""
    solver = find_solver(methods()[assignment.method], assignment.target)
    assert isinstance(solver, Solver)  # or it would not have been assigned
    return solver


def pose(
    architecture: Architecture, target: str, state: Mapping[str, Tensor], statistics: Statistics
) -> Problem:
    """The problem of one target of a layer, from its tensors and statistics."""
    family, heads, moments = architecture.family, architecture.geometry, statistics.moments
    gradients = statistics.gradients

    def affine(role: str) -> Affine:
        return Affine(*canonical(family, architecture, state, role))

    def gradient(role: str) -> Tensor | None:
        return gradients and gradients.outputs.get(role)

    if target == "qk":
        queries = gradients and gradients.queries
        return QKProblem(affine("q"), affine("k"), heads, moments["attn_in"], statistics.attention, queries)
    if target == "ov":
        return OVProblem(affine("v"), affine("o"), heads, moments["o_in"], gradient("o"))
    if target == "mlp":
        inputs, role = {role: affine(role) for role in family.mlp_inputs}, family.mlp_output
        return MLPProblem(inputs, role, affine(role), moments["down_in"], gradient(role))
    return ProjectionProblem(target, affine(target), moments[family.site(target)], gradient(target))
