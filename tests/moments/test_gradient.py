from __future__ import annotations

import pytest
import torch

from lrc.families import Heads
from lrc.moments.gradient import GradientSum, GradientTargets

KV_HEADS, HEADS, HEAD_DIM, TOKENS = 2, 6, 4, 5


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_by_one(parts: list[tuple[torch.Tensor, torch.Tensor]], rotary: bool) -> torch.Tensor:
    """The queries' moment, token by token and head by head."""
    width = HEAD_DIM // 2 if rotary else HEAD_DIM
    total, tokens = torch.zeros(KV_HEADS, width, width).double(), 0
    for q, gradient in parts:
        for one, slope in zip(
            q.reshape(-1, HEADS, HEAD_DIM), gradient.reshape(-1, HEADS, HEAD_DIM), strict=True
        ):
            tokens += 1
            shares = torch.zeros(KV_HEADS, HEAD_DIM // 2).double()
            for head in range(HEADS):
                key = head // (HEADS // KV_HEADS)
                for j in range(HEAD_DIM // 2):
                    other = j + HEAD_DIM // 2
                    shares[key, j] += one[head, j] * slope[head, j] + one[head, other] * slope[head, other]
                if not rotary:
                    total[key] += torch.outer(slope[head], slope[head])
            if rotary:
                total += torch.einsum("ki,kj->kij", shares, shares)
    return total / tokens


def of_outputs(rotary: bool, widths: dict[str, int], *, queries: bool) -> GradientSum:
    heads = Heads(HEADS, KV_HEADS, HEAD_DIM, "half" if rotary else "none")
    return GradientSum(heads, widths, queries=queries, device=torch.device("cpu"))


@pytest.mark.parametrize("rotary", [True, False])
def test_moments_are_the_means_over_tokens_whatever_the_scale(rotary):
    parts = [
        (normal(i, 2, TOKENS, HEADS * HEAD_DIM), normal(9 + i, 2, TOKENS, HEADS * HEAD_DIM)) for i in (0, 1)
    ]
    outputs = [normal(20 + i, 2, TOKENS, 3) for i in (0, 1)]
    sums = of_outputs(rotary, {"o": 3}, queries=True)
    for (q, gradient), output, scale in zip(parts, outputs, (8.0, 0.25), strict=True):
        sums.add({"o": output * scale}, (q, gradient * scale), torch.tensor(scale))
    moment = sums.moment()
    assert moment.tokens == 4 * TOKENS
    assert moment.queries is not None
    torch.testing.assert_close(moment.queries.double(), one_by_one(parts, rotary))
    rows = torch.cat(outputs).reshape(-1, 3)
    torch.testing.assert_close(moment.outputs["o"], rows.T @ rows / len(rows))
    assert moment.finite


def test_collects_what_is_asked_for():
    sums = of_outputs(True, {"up": 3}, queries=False)
    sums.add({"up": normal(0, 7, 3)}, None, torch.ones(()))
    moment = sums.moment()
    assert (list(moment.outputs), moment.queries, moment.tokens) == (["up"], None, 7)
    assert not GradientTargets()
    assert GradientTargets(queries=True)
    assert GradientTargets(frozenset({"o"}))


def test_says_where_a_gradient_is_no_number():
    sums = of_outputs(True, {"up": 2}, queries=False)
    sums.add({"up": torch.tensor([[1.0, torch.inf]])}, None, torch.ones(()))
    assert not sums.moment().finite
