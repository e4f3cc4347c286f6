from __future__ import annotations

from typing import Any

import pytest
import torch

from lrc.maths.linalg import direction_scores
from lrc.methods.contract import Factors
from lrc.methods.shared.pairs import input_moment
from lrc.methods.svd import solve_projection

CASES = [{"rows": 24, "columns": 16, "bias": True}, {"rows": 16, "columns": 24}]


@pytest.mark.parametrize("facts", CASES)
def test_the_bias_makes_up_for_the_mean_of_what_is_lost(make_case: Any, facts: Any) -> None:
    """The pair knows nothing of the data; of all biases the one beside it is the best."""
    case = make_case("projection", **facts)
    solution = solve_projection(case.problem, 4)
    part, weight = solution.parts["o"], case.problem.matrix.weight
    assert isinstance(part, Factors)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(part.tensors["B"] @ part.tensors["A"], u[:, :4] * s[:4] @ vt[:4])
    mean = case.changes(solution).mean(dim=0)
    if "bias" in facts:
        assert float(mean.norm()) < 1e-9 * float(weight.norm())
    else:
        assert part.bias is None
        assert float(mean.norm()) > 0.1


@pytest.mark.parametrize("facts", CASES)
def test_one_direction_costs_what_its_score_says(make_case: Any, facts: Any) -> None:
    """Importance scores directions by what the method makes of dropping them, its bias included."""
    problem = make_case("projection", **facts).problem
    (smallest, *_) = direction_scores(problem.matrix.weight, input_moment(problem), problem.gradient)
    assert solve_projection(problem, 15).predicted.loss == pytest.approx(float(smallest) / 2, rel=1e-6)
