"""What every method found in the folder must do, unasked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lrc.families import Heads
from lrc.methods import methods
from lrc.methods.contract import Affine, Factors, ProjectionProblem, Shapes, Solution, Solver
from lrc.moments import collectors
from lrc.moments.moment import Moment

NO_HEADS = Heads(1, 1, 1)


class Posed:
    """A solver with a problem that it takes, and its sizes."""

    def __init__(
        self, make: Callable[..., Any], method: str, target: str, facts: dict, options: dict, **more: Any
    ) -> None:
        self.case = make(target, **facts, **more)
        self.solver: Solver = methods()[method].solvers[target]
        options = {name: option.default for name, option in self.solver.options.items()} | options
        if refusal := self.solver.refuses(self.case.heads or NO_HEADS, options):
            pytest.skip(refusal)
        self.options = options
        rule, self.problem = self.solver.size, self.case.problem
        self.full = rule.full(self.case.target, options)
        legal = rule.choices(self.case.target, options, 1)
        self.sizes = [*legal[:: max(len(legal) // 4, 1)], self.full]

    def solve(self, size: Any, problem: Any = None) -> Solution:
        return self.solver.solve(problem or self.problem, size, **self.options)

    def cost(self, solution: Solution) -> float:
        """What the method minimises: its predicted loss or error."""
        predicted = solution.predicted
        if "loss" not in (self.solver.metric, self.options.get("metric")):
            return predicted.error
        assert predicted.loss is not None
        return predicted.loss


@pytest.fixture
def posed(make_case: Any, method: str, target: str, facts: dict, options: dict) -> Posed:
    return Posed(make_case, method, target, facts, options)


@pytest.fixture
def hard(make_case: Any, method: str, target: str, facts: dict, options: dict) -> Posed:
    return Posed(make_case, method, target, facts, options, hard=True)


def tensors(item: Any) -> Iterator[Tensor]:
    """Every tensor inside a problem or solution."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, dict):
        for value in item.values():
            yield from tensors(value)
    elif is_dataclass(item):
        for field in fields(item):
            yield from tensors(getattr(item, field.name))


def test_at_full_size_gives_the_map_back(posed):
    if not posed.solver.exact:
        pytest.skip("not exact at full size")
    solution = posed.solve(posed.full)
    assert posed.case.measured(solution) < 1e-14 * solution.predicted.reference
    assert solution.predicted.error < 1e-14 * solution.predicted.reference


def test_predicts_the_error_on_the_very_tokens(posed):
    for size in posed.sizes[:-1]:
        solution = posed.solve(size)
        assert solution.predicted.error == pytest.approx(posed.case.measured(solution), rel=1e-6)
        assert 0 < solution.predicted.relative < 10


def test_predicts_the_loss_on_the_very_tokens_and_gradients(posed):
    for size in posed.sizes[:-1]:
        solution = posed.solve(size)
        if solution.predicted.metric != "output":
            pytest.skip("no gradients at an output")
        assert solution.predicted.loss is not None
        products = posed.case.gradients @ posed.case.changes(solution).T  # every gradient with every change
        assert solution.predicted.loss == pytest.approx(float(products.square().mean() / 2), rel=1e-6)


def test_what_it_minimises_does_not_grow_with_the_size(posed):
    if posed.options.get("refit") == "none":
        pytest.skip("what is left out may cancel what else is")
    if (
        posed.options.get("metric") in ("attention", "loss")
        and posed.case.heads
        and posed.case.heads.rotary == "half"
    ):
        pytest.skip("rotary pairs may cancel")
    costs = [posed.cost(posed.solve(size)) for size in posed.sizes]
    for smaller, larger in pairwise(costs):
        assert larger <= smaller * (1 + 1e-5)
    assert costs[-1] < costs[0]


def test_a_pair_in_the_metric_of_the_data_never_loses_to_plain_svd(posed, method):
    solution = posed.solve(posed.sizes[0])
    part = next(iter(solution.parts.values()))
    if posed.solver.metric != "data" or not isinstance(part, Factors) or part.kind != "low_rank":
        pytest.skip("no low-rank pair in the metric of the data")
    for size in posed.sizes:
        plain = methods()["svd"].solvers["projection"].solve(posed.problem, size)
        assert posed.solve(size).predicted.error <= plain.predicted.error * (1 + 1e-6) + 1e-12


def test_identity_moments_make_a_pair_plain_svd(posed):
    if not isinstance(posed.problem, ProjectionProblem):
        pytest.skip("no projection")
    rows, columns = posed.problem.matrix.weight.shape
    white = Moment(torch.eye(columns).double(), torch.zeros(columns).double(), 1)
    size = posed.sizes[1]
    problem = replace(posed.problem, input=white, gradient=torch.eye(rows).double())
    (part,) = posed.solve(size, problem).parts.values()
    if not isinstance(part, Factors) or part.kind != "low_rank":
        pytest.skip("no low-rank pair")
    u, s, vt = torch.linalg.svd(problem.matrix.weight, full_matrices=False)
    expected = u[:, :size] @ torch.diag(s[:size]) @ vt[:size]
    torch.testing.assert_close(part.tensors["B"] @ part.tensors["A"], expected, rtol=1e-9, atol=1e-9)


def test_hard_moments_give_finite_solutions_that_keep_their_word(hard):
    for size in hard.sizes:
        solution = hard.solve(size)
        assert all(t.isfinite().all() for t in tensors(solution))
        reference = solution.predicted.reference
        measured = hard.case.measured(solution)
        assert solution.predicted.error == pytest.approx(measured, rel=1e-3, abs=1e-9 * reference)
        assert measured <= 1.001 * reference
    assert measured < 1e-8 * reference


def test_float32_moments_are_enough(posed):
    size = posed.sizes[len(posed.sizes) // 2]
    exact, input_name = posed.solve(size), "input" if hasattr(posed.problem, "input") else None
    name = input_name or ("output" if hasattr(posed.problem, "heads") else "hidden")
    held = getattr(posed.problem, name)
    single = replace(held, second=held.second.float(), mean=held.mean.float())
    rough = posed.solve(size, replace(posed.problem, **{name: single}))
    assert rough.predicted.error == pytest.approx(exact.predicted.error, rel=1e-3)
    assert posed.case.measured(rough) == pytest.approx(posed.case.measured(exact), rel=1e-3)


def test_weights_may_be_bfloat16(posed):
    """A checkpoint's weights come as they are stored."""
    size = posed.sizes[1]

    def stored(item: Any) -> Any:
        if isinstance(item, Affine):
            bias = None if item.bias is None else item.bias.bfloat16()
            return Affine(item.weight.bfloat16(), bias)
        return {k: stored(v) for k, v in item.items()} if isinstance(item, dict) else item

    problem = posed.problem
    rounded = replace(problem, **{f.name: stored(getattr(problem, f.name)) for f in fields(problem)})

    def widened(item: Any) -> Any:
        if isinstance(item, Affine):
            return Affine(item.weight.double(), None if item.bias is None else item.bias.double())
        return {k: widened(v) for k, v in item.items()} if isinstance(item, dict) else item

    wide = replace(rounded, **{f.name: widened(getattr(rounded, f.name)) for f in fields(rounded)})
    narrow, same = posed.solve(size, rounded), posed.solve(size, wide)
    for one, other in zip(tensors(narrow), tensors(same), strict=True):
        assert torch.equal(one.double(), other.double())
    assert narrow.predicted == same.predicted


def test_same_input_same_bits_and_inputs_untouched(posed):
    before = [t.clone() for t in tensors(posed.problem)]
    first, second = posed.solve(posed.sizes[0]), posed.solve(posed.sizes[0])
    for one, other in zip(tensors(first), tensors(second), strict=True):
        assert torch.equal(one, other)
    assert first.predicted == second.predicted
    for tensor, copy in zip(tensors(posed.problem), before, strict=True):
        assert torch.equal(tensor, copy)


def test_shapes_are_those_of_the_size(posed):
    """Weights stored are what the size rule counts, biases aside."""
    for size in posed.sizes:
        parts = posed.solve(size).parts
        assert set(parts) == set(posed.case.target.matrices)
        stored = sum(
            part.weight.numel() if isinstance(part, Affine) else sum(t.numel() for t in part.tensors.values())
            for part in parts.values()
        )
        assert stored == posed.solver.size.weights(posed.case.target, size, posed.options)


def test_sizes_that_it_can_have_are_legal_and_survive_a_plan(posed):
    rule, target, options = posed.solver.size, posed.case.target, posed.options
    for multiple in (None, 1):
        sizes = rule.choices(target, options, multiple)
        kept = [rule.weights(target, size, options) for size in sizes]
        assert kept == sorted(kept)
        assert kept[-1] < target.parameters
    nearest = [rule.nearest(target, keep, options) for keep in (0.01, 0.3, 0.8)]
    for size in (*posed.sizes[:-1], *nearest):
        assert rule.refusal(target, size, options) is None
        assert rule.read(yaml.safe_load(yaml.safe_dump(size))) == size
        assert hash(size) == hash(rule.read(size))


def test_states_memory_for_the_problem_in_float64_at_least(posed):
    """The weights, and the moment that they are solved with."""
    matrices = posed.case.target.matrices.values()
    shapes = Shapes(posed.case.target, posed.case.heads or NO_HEADS)
    needed = 8 * max(matrix.parameters + matrix.columns**2 for matrix in matrices)
    for size in posed.sizes:
        assert posed.solver.memory(shapes, size, posed.options) >= needed


def test_names_a_paper_and_known_collectors(posed, method):
    assert posed.solver.paper
    assert methods()[method].summary.endswith(".")
    brought = set(posed.solver.option_needs.values())
    assert {*posed.solver.needs, *brought} <= collectors()
    if other := posed.solver.rotary:
        assert "projection" in methods()[other].solvers
