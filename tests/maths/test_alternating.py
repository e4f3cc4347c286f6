from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lrc.maths import alternating
from lrc.maths.alternating import Maps, attended_error, attended_maps, joint_rows, shared_rows
from lrc.maths.linalg import best_projector

DIM, RANK, GROUPS, GROUP, HIDDEN = 8, 4, 2, 3, 20
HEADS = GROUPS * GROUP
EYE = torch.eye(DIM).double()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads_of(weight: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """S_h and H_h (GROUPS, GROUP, DIM, DIM)."""
    cuts = [slice(DIM * h, DIM * h + DIM) for h in range(HEADS)]
    moments = torch.stack([c[cut, cut] for cut in cuts])
    grams = torch.stack([weight[:, cut].T @ weight[:, cut] for cut in cuts])
    return moments.unflatten(0, (GROUPS, GROUP)), grams.unflatten(0, (GROUPS, GROUP))


def correlated(seed: int) -> tuple[Tensor, Tensor]:
    """A weight, and the moment of tokens whose heads share much of what they carry, each at its own sizes."""
    scales = 10 ** -(2 * torch.rand(HEADS * DIM, generator=torch.Generator().manual_seed(seed)).double())
    x = (normal(400, 12, seed=seed) @ normal(12, HEADS * DIM, seed=seed + 1)) * scales
    x = x + 0.3 * scales * normal(400, HEADS * DIM, seed=seed + 2)
    return normal(HIDDEN, HEADS * DIM, seed=seed + 3), x.T @ x / 400


def stacked(moments: Tensor, grams: Tensor) -> Tensor:
    return best_projector(moments.mean(dim=1), grams.sum(dim=1), RANK).down


def shared_error(moments: Tensor, grams: Tensor, down: Tensor) -> Tensor:
    """Every head with its own best reader, one by one."""
    total = torch.zeros(()).double()
    for k in range(GROUPS):
        for s, h in zip(moments[k], grams[k], strict=True):
            up = s @ down[k].T @ torch.linalg.inv(down[k] @ s @ down[k].T)
            delta = EYE - up @ down[k]
            total = total + torch.trace(h @ delta @ s @ delta.T)
    return total


def joint_error(weight: Tensor, c: Tensor, down: Tensor) -> Tensor:
    """The whole output, with a projection fitted to what is left."""
    reader = torch.block_diag(*[down[h // GROUP] for h in range(HEADS)])
    delta = weight - weight @ c @ reader.T @ torch.linalg.inv(reader @ c @ reader.T) @ reader
    return torch.trace(delta @ c @ delta.T)


def descended(error: Any, start: Tensor) -> float:
    """The error that a general minimiser reaches from the same start."""
    down = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([down], max_iter=400, history_size=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = error(down)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return error(down).item()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternating, "FALL", 1e-6)
    monkeypatch.setattr(alternating, "ROUNDS", 300)


@pytest.mark.parametrize("seed", range(3))
def test_shared_rows_get_where_a_general_minimiser_gets(patient, seed):
    moments, grams = heads_of(*correlated(10 * seed))
    start = stacked(moments, grams)
    maps, _ = shared_rows(moments, grams, start)
    reached = float(shared_error(moments, grams, maps.down))
    delta = EYE - maps.up @ maps.down.unsqueeze(1)
    assert float((grams @ delta @ moments * delta).sum()) == pytest.approx(reached, rel=1e-6)
    assert reached < 0.99 * float(shared_error(moments, grams, start))
    assert reached <= 1.02 * descended(lambda down: shared_error(moments, grams, down), start)


@pytest.mark.parametrize("seed", range(3))
def test_joint_rows_get_where_a_general_minimiser_gets(patient, seed):
    weight, c = correlated(10 * seed)
    start = stacked(*heads_of(weight, c))
    down = joint_rows(weight, c, start)[0].down
    reached = float(joint_error(weight, c, down))
    assert reached < 0.99 * float(joint_error(weight, c, start))
    assert reached <= 1.02 * descended(lambda down: joint_error(weight, c, down), start)


@pytest.mark.parametrize("seed", range(3))
def test_no_round_raises_the_error_and_few_are_nearly_enough(monkeypatch, seed):
    weight, c = correlated(10 * seed)
    moments, grams = heads_of(weight, c)
    start = stacked(moments, grams)
    usual = shared_rows(moments, grams, start)[0].down, joint_rows(weight, c, start)[0].down
    monkeypatch.setattr(alternating, "FALL", 0.0)
    errors = []
    for rounds in (*range(12), 60):
        monkeypatch.setattr(alternating, "ROUNDS", rounds)
        maps, count = shared_rows(moments, grams, start)
        assert count <= rounds
        down = joint_rows(weight, c, start)[0].down
        errors.append((float(shared_error(moments, grams, maps.down)), float(joint_error(weight, c, down))))
    for before, after in pairwise(errors):
        assert all(new <= old * (1 + 1e-5) for old, new in zip(before, after, strict=True))
    assert errors[0][0] == pytest.approx(float(shared_error(moments, grams, start)), rel=1e-6)
    assert float(shared_error(moments, grams, usual[0])) < 1.02 * errors[-1][0]
    assert float(joint_error(weight, c, usual[1])) < 1.1 * errors[-1][1]


def test_joint_rows_start_from_the_best():
    weight, c = correlated(1)
    start = stacked(*heads_of(weight, c))
    good, rounds = joint_rows(weight, c, start)
    again, more = joint_rows(weight, c, start, good.down)
    assert more < rounds
    assert float(joint_error(weight, c, again.down)) <= float(joint_error(weight, c, good.down)) * (1 + 1e-9)


def test_one_reader_a_value_head_has_its_optimum_already():
    weight, c = correlated(2)
    moments, grams = (x.flatten(0, 1).unsqueeze(1) for x in heads_of(weight, c))
    p = best_projector(moments[:, 0], grams[:, 0], RANK)
    maps, rounds = shared_rows(moments, grams, p.down)
    assert rounds <= alternating.PATIENCE
    torch.testing.assert_close(maps.up[:, 0] @ maps.down, p.up @ p.down, rtol=1e-4, atol=1e-4)


def attention_toy(seed: int) -> tuple[Tensor, Tensor]:
    """Queries of two heads and the covariances of what they attend to, which goes with the query."""
    q, k = normal(2, 60, DIM, seed=seed), normal(80, DIM, seed=seed + 1) @ normal(DIM, DIM, seed=seed + 2) / 2
    p = (q @ k.T / 2).softmax(dim=-1)
    centred = k - (p @ k).unsqueeze(-2)
    return q, torch.einsum("hmn,hmnd,hmne->hmde", p, centred, centred)


def changed(q: Tensor, covariance: Tensor, up: Tensor, down: Tensor) -> float:
    """Query by query."""
    total = 0.0
    for h in range(2):
        for query, cov in zip(q[h], covariance[h], strict=True):
            left = query - query @ up[h] @ down
            total += float(left @ cov @ left)
    return total


@pytest.mark.parametrize("seed", range(3))
def test_attended_maps_beat_what_takes_queries_as_independent(monkeypatch, seed):
    q, covariance = attention_toy(100 * seed)
    p = best_projector(covariance.mean(dim=(0, 1)), (q.mT @ q).sum(dim=0), RANK)
    start = Maps(p.up.expand(2, -1, -1), p.down)
    assert float(attended_error(q, covariance, start)) == pytest.approx(
        changed(q, covariance, start.up, start.down)
    )
    monkeypatch.setattr(alternating, "FALL", 0.0)
    errors = []
    for rounds in (0, 1, 2, 3, 5, 8, 100):
        monkeypatch.setattr(alternating, "ROUNDS", rounds)
        errors.append(changed(q, covariance, *attended_maps(q, covariance, start)[0][:2]))
    assert errors[0] == pytest.approx(changed(q, covariance, start.up, start.down))
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]
    # A general minimiser over both maps finds nothing much better nearby.
    maps = attended_maps(q, covariance, start)[0]
    both = torch.cat([maps.up.mT.flatten(0, 1), maps.down])

    def error(rows: Tensor) -> Tensor:
        up = rows[: 2 * RANK].unflatten(0, (2, RANK)).mT
        return attended_error(q, covariance, Maps(up, rows[2 * RANK :]))

    assert errors[-1] <= 1.02 * descended(error, both)


def test_a_shared_table_is_lowered_in_every_round_from_the_product_metric(monkeypatch):
    random = torch.Generator().manual_seed(0)
    table, x = (torch.randn(n, 8, generator=random, dtype=torch.float64) for n in (40, 60))
    c, p = x.T @ x / 60, torch.rand(40, generator=random, dtype=torch.float64) ** 4
    q = torch.rand(40, generator=random, dtype=torch.float64)
    start = best_projector(c, table.T @ (p[:, None] * table), 3)

    def cost(maps: Maps) -> float:
        delta = table - maps.up @ maps.down
        return float(sum(p[t] * d @ d + q[t] * d @ c @ d for t, d in enumerate(delta)))

    costs = [cost(Maps(table @ start.up, start.down))]
    for rounds in range(1, 9):
        monkeypatch.setattr(alternating, "ROUNDS", rounds)
        maps, counted = alternating.shared_table(table, p, q, c, start.down)
        costs.append(cost(maps))
        assert counted <= rounds
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.99 * costs[0]
    # Of a given factor the other is the best there is: no small change of either lowers the cost to first order.
    up, down = (factor.clone().requires_grad_() for factor in (maps.up, maps.down))
    delta = table - up @ down
    lost = (p * delta.square().sum(-1)).sum() + (q * (delta @ c * delta).sum(-1)).sum()
    slopes = torch.autograd.grad(lost, (up, down))
    assert float(slopes[0].norm()) < 1e-9 * float(table.norm())
    assert float(slopes[1].norm()) < 1e-1 * float(table.norm())


def test_a_singular_solve_tells_its_damping():
    """A row that is nothing leaves the matrix of every solve singular."""
    weight, c = correlated(4)
    moments, grams = heads_of(weight, c)
    start = stacked(moments, grams)
    assert shared_rows(moments, grams, start)[0].damping == 0.0
    assert joint_rows(weight, c, start)[0].damping == 0.0
    start[:, 1] = 0
    assert 0 < shared_rows(moments, grams, start)[0].damping <= 1e-2
    assert 0 < joint_rows(weight, c, start)[0].damping <= 1e-2
    table, even = normal(40, DIM, seed=1), torch.ones(40, dtype=torch.float64)
    assert alternating.shared_table(table, even, even, EYE, EYE[:3])[0].damping == 0.0
    down = EYE[:3] * torch.tensor([[1.0], [0.0], [1.0]])
    assert 0 < alternating.shared_table(table, even, even, EYE, down)[0].damping <= 1e-2
