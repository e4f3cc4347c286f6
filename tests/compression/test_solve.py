"""What solvers ask for is what their problems hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lrc.checkpoint.reader import CheckpointReader
from lrc.compression.solve import solve_layer
from lrc.methods import Method, methods
from lrc.methods.contract import Prediction, Problem, Solution, solves
from lrc.methods.sizes import ComponentRank, PairRank
from lrc.moments.gradient import GradientMoment, GradientTargets
from lrc.moments.moment import Moment
from lrc.plan.resolved import Assignment, LayerPlan
from lrc.walk.needs import gradients_needed


@pytest.fixture
def posed(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems posed to a method that reads gradients, in its component solvers only where an option says so."""
    found: list[Problem] = []

    def solver(target: Any) -> Any:
        def solve(problem: Any, size: int, *, metric: str = "loss") -> Solution:
            found.append(problem)
            return Solution({}, Prediction(0.0, 1.0, "output"))

        if target == "projection":
            return solves(target, size=PairRank(), needs=("moments", "gradients"), paper="none")(solve).solver
        needs = {("metric", "loss"): "gradients"}
        return solves(target, size=ComponentRank(), option_needs=needs, paper="none")(solve).solver

    solvers = {target: solver(target) for target in ("projection", "qk", "ov", "mlp")}
    monkeypatch.setitem(methods(), "fake", Method("fake", "None.", solvers))
    return found


def plan(*targets: str, **options: str) -> LayerPlan:
    return LayerPlan(1, tuple(Assignment(t, "fake", 1, {"metric": "loss"} | options, 1, 2) for t in targets))


@pytest.mark.parametrize(
    ("family", "output", "single"), [("llama", "down", "up"), ("gpt2", "fc_out", "fc_in")]
)
def test_every_problem_has_the_gradients_of_its_own_outputs(tiny_checkpoint, posed, family, output, single):
    reader = CheckpointReader(tiny_checkpoint(family))
    architecture = reader.architecture
    moments = dict.fromkeys(architecture.targets, Moment(torch.eye(2), torch.zeros(2), 1))
    outputs = {role: torch.full((1,), float(i)) for i, role in enumerate(architecture.matrices)}
    gradients = GradientMoment(outputs, torch.full((1,), -1.0), 1)
    layer = plan("qk", "ov", "mlp", single)
    assert gradients_needed(architecture, layer) == GradientTargets(frozenset({"o", output, single}), True)
    found = {"moments": moments, "gradients": gradients.by_target(architecture.family)}
    solve_layer(architecture, layer, reader.layer(1), found)
    expected = [gradients.queries, outputs["o"], outputs[output], outputs[single]]
    assert [problem.gradient for problem in posed] == expected
    solve_layer(architecture, layer, reader.layer(1), {"moments": moments})
    assert all(problem.gradient is None for problem in posed[4:])


def test_only_what_options_bring_along_is_asked_for(tiny_checkpoint, posed):
    architecture = CheckpointReader(tiny_checkpoint("llama")).architecture
    assert not gradients_needed(architecture, plan("qk", "ov", "mlp", metric="data"))
    assert gradients_needed(architecture, plan("qk")) == GradientTargets(queries=True)
    assert gradients_needed(architecture, plan("q", "ov")) == GradientTargets(frozenset({"q", "o"}))
