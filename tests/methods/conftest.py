"""Small random problems of every target, with the tokens behind their moments and a way to measure solutions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lrc.families import Heads, Matrix, Target
from lrc.methods.contract import (
    Affine,
    Factors,
    MLPProblem,
    OVProblem,
    Problem,
    ProjectionProblem,
    QKProblem,
    Solution,
    Solver,
)
from lrc.modules import kinds
from lrc.moments.attention import AttentionMoment
from lrc.moments.attention_samples import AttentionSamples
from lrc.moments.moment import Moment

HIDDEN, HEAD_DIM, WIDTH = 10, 6, 16
# target, then what sets the problem apart
CASES: list[tuple[str, dict[str, Any]]] = [
    ("projection", {"rows": 16, "columns": 24}),
    ("projection", {"rows": 24, "columns": 16, "bias": True}),
    ("projection", {"rows": 16, "columns": 16, "bias": True}),
    ("qk", {"kv_heads": 4}),
    ("qk", {"kv_heads": 4, "bias": True}),
    ("qk", {"kv_heads": 2, "bias": True}),
    ("qk", {"kv_heads": 4, "rotary": "half"}),
    ("qk", {"kv_heads": 2, "rotary": "half", "bias": True}),
    ("ov", {"kv_heads": 4}),
    ("ov", {"kv_heads": 4, "v_bias": True, "o_bias": True}),
    ("ov", {"kv_heads": 2, "v_bias": True}),
    ("ov", {"kv_heads": 1, "o_bias": True}),
    ("mlp", {"gated": True}),
    ("mlp", {"gated": True, "bias": True}),
    ("mlp", {"gated": False, "bias": True}),
]


class Random:
    """Float64 normal tensors, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def affine(self, rows: int, columns: int, bias: bool) -> Affine:
        return Affine(self(rows, columns), self(rows) if bias else None)

    def tokens(self, count: int, width: int, *, hard: bool) -> Tensor:
        """Correlated tokens, not centred; ``hard``: of widely spread sizes, one dead, fewer than dimensions."""
        x = self(count, width) @ self(width, width) + 2 * self(width)
        if not hard:
            return x
        scales = torch.logspace(-4, 3, width, dtype=torch.float64)
        scales[width // 2] = 0
        return x[: width // 2] * scales


@dataclass(frozen=True)
class Case:
    """A problem; ``changes`` gives a solution's changes (samples, ...) whose squares its prediction is about.

    ``options`` are those under which the prediction is about them.
    """

    problem: Problem
    target: Target
    heads: Heads | None
    changes: Callable[[Solution], Tensor]
    gradients: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def measured(self, solution: Solution) -> float:
        """The mean squared change on the very tokens."""
        changes = self.changes(solution)
        return float(changes.square().sum() / changes.shape[0])


def apply(part: Affine | Factors, x: Tensor) -> Tensor:
    """What a part of a solution makes of x (..., in)."""
    if isinstance(part, Factors):
        weight = kinds()[part.kind].dense(part.tensors)
        return F.linear(x, weight, part.bias)
    return F.linear(x, part.weight.double(), part.bias)


def moment_of(x: Tensor) -> Moment:
    x = x.flatten(0, -2)
    return Moment(x.T @ x / len(x), x.mean(dim=0), len(x))


def _affine(m: Affine, x: Tensor) -> Tensor:
    return F.linear(x, m.weight, m.bias)


def _matrix(m: Affine) -> Matrix:
    rows, columns = m.weight.shape
    return Matrix(rows, columns, m.bias is not None)


def projection(seed: int, *, hard: bool, rows: int, columns: int, bias: bool = False) -> Case:
    random = Random(seed)
    matrix, x = random.affine(rows, columns, bias), random.tokens(60, columns, hard=hard)
    gradients = random.tokens(40, rows, hard=hard)
    problem = ProjectionProblem("o", matrix, moment_of(x), gradients.T @ gradients / len(gradients))
    target = Target("o", {"o": _matrix(matrix)}, min(rows, columns), 1, rows + columns)

    def changes(solution: Solution) -> Tensor:
        return apply(solution.parts["o"], x) - _affine(matrix, x)

    return Case(problem, target, None, changes, gradients)


def qk(seed: int, *, hard: bool, kv_heads: int, rotary: Any = "none", bias: bool = False) -> Case:
    random, heads, scale = Random(seed), Heads(4, kv_heads, HEAD_DIM, rotary), HEAD_DIM**-0.5
    q, k = (random.affine(n * HEAD_DIM, HIDDEN, bias) for n in (4, kv_heads))
    x = random.tokens(12, HIDDEN, hard=hard)
    x /= x.norm(dim=1).max()  # so that attention is not all on one key
    step = 1 if rotary == "none" else 2
    target = Target("qk", {"q": _matrix(q), "k": _matrix(k)}, HEAD_DIM, step, (4 + kv_heads) * HIDDEN)
    positions = (
        torch.arange(len(x), dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, 0.1] * 2).double()
    )

    def split(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """By head (heads, tokens, width), keys once for every query head that shares them."""
        queries = queries.unflatten(-1, (4, -1)).transpose(0, 1)
        keys = keys.unflatten(-1, (kv_heads, -1)).transpose(0, 1)
        return queries, keys.repeat_interleave(heads.group, dim=0)

    def turned(y: Tensor, angles: Tensor, columns: Tensor | None) -> Tensor:
        """Heads' vectors (heads, tokens, width) turned by angles (..., tokens or 1, HEAD_DIM), its own column each."""
        kept = torch.arange(HEAD_DIM).expand(kv_heads, -1) if columns is None else columns
        own = angles[..., kept.repeat_interleave(heads.group, dim=0)].transpose(-3, -2)
        first, second = y.chunk(2, dim=-1)
        return y * own.cos() + torch.cat((-second, first), dim=-1) * own.sin()

    def independent(queries: Tensor, keys: Tensor, columns: Tensor | None) -> Tensor:
        """Every query with every key, (turns, heads, queries, keys); rotary: for every relative angle of the pairs."""
        queries, keys = split(queries, keys)
        if rotary == "half":
            # Means over quarter turns, pairs turning independently, are those over all angles.
            quarters = torch.tensor(list(itertools.product(range(4), repeat=HEAD_DIM // 2))).double()
            queries = turned(queries, (quarters.repeat(1, 2) * torch.pi / 2)[:, None], columns)
        return queries @ keys.mT

    def scores(queries: Tensor, keys: Tensor, columns: Tensor | None) -> Tensor:
        """Scaled scores (heads, queries, keys) of the tokens as one sequence."""
        queries, keys = split(queries, keys)
        if rotary == "half":
            queries, keys = (turned(y, positions, columns) for y in (queries, keys))
        return queries @ keys.mT * scale

    before = _affine(q, x), _affine(k, x)
    later = torch.full((len(x), len(x)), -torch.inf).double().triu(1)
    attention = (scores(*before, None) + later).softmax(dim=-1)
    # Of every query, the covariance of one-hot draws of a key.
    spread = torch.diag_embed(attention) - attention.unsqueeze(-1) * attention.unsqueeze(-2)
    # Of the loss by the scaled scores, as softmax passes it on: nothing where a query sees nothing, nothing in all.
    slopes = (spread @ random(4, len(x), len(x), 1)).squeeze(-1)

    def statistics() -> dict[str, AttentionMoment | AttentionSamples]:
        queries, keys = split(*before)
        each = torch.einsum("hnd,hmnl,hle->hmde", keys, spread, keys).unflatten(0, (kv_heads, -1))
        samples = AttentionSamples(queries.unflatten(0, (kv_heads, -1)) * scale, each)
        pairs = None
        if rotary == "half":
            queries, keys = (turned(y, positions, None) for y in (queries, keys))
            products = torch.einsum("hmd,hnd->hmnd", queries, keys) * scale
            shares = products[..., : HEAD_DIM // 2] + products[..., HEAD_DIM // 2 :]
            pairs = torch.einsum("hmni,hmnl,hmlj->hij", shares, spread, shares) / len(x)
            pairs = pairs.unflatten(0, (kv_heads, -1)).sum(dim=1)
        moment = AttentionMoment(each.mean(dim=2).sum(dim=1), pairs, len(x), scale)
        return {"attention": moment, "attention_samples": samples}

    def gradient() -> Tensor:
        queries, keys = split(*before)
        if rotary == "none":
            reached = (scale * slopes @ keys).unflatten(0, (kv_heads, -1))  # ∂L/∂q
            return (reached.mT @ reached).sum(dim=1) / len(x)
        queries, keys = (turned(y, positions, None) for y in (queries, keys))
        pulls = queries * (scale * slopes @ keys)
        pulls = (
            (pulls[..., : HEAD_DIM // 2] + pulls[..., HEAD_DIM // 2 :])
            .unflatten(0, (kv_heads, -1))
            .sum(dim=1)
        )
        return pulls.mT @ pulls / len(x)

    def changes(solution: Solution) -> Tensor:
        """Of scores: every query with every key. Of nats: roots of what every query and head adds to the divergence."""
        after = apply(solution.parts["q"], x), apply(solution.parts["k"], x)
        if solution.predicted.metric == "scores":
            change = independent(*after, solution.rotary_columns) - independent(*before, None)
            return change.movedim(-3, -1).flatten(0, -2)  # (samples, heads)
        if solution.predicted.metric == "loss":
            if rotary == "half":  # what a token's change of scores does to the loss, by key head
                change = scores(*after, solution.rotary_columns) - scores(*before, None)
                nats = (slopes * change).sum(dim=-1).unflatten(0, (kv_heads, -1)).sum(dim=1).mT
                return nats / 2**0.5
            # every query of a key head with every slope of the same
            change = (independent(*after, None) - independent(*before, None)).unflatten(0, (kv_heads, -1))
            nats = scale * torch.einsum("kgmn,kfln->mlkgf", change, slopes.unflatten(0, (kv_heads, -1)))
            return nats.flatten(0, 1) / (2 * heads.group) ** 0.5
        change, seen = scores(*after, solution.rotary_columns) - scores(*before, None), spread
        if rotary == "none" and "rounds" not in solution.numerics:
            # queries are taken as independent of what is attended to: each with the mean over all
            mean = spread.mean(dim=1).unflatten(0, (kv_heads, -1)).mean(dim=1)
            seen = mean.repeat_interleave(heads.group, dim=0).unsqueeze(1).expand_as(spread)
        variances = torch.einsum("hmn,hmnl,hml->mh", change, seen, change)
        return (variances.clamp_min(0) / (2 * 4)).sqrt()

    problem = QKProblem(q, k, heads, moment_of(x), gradient(), statistics())
    return Case(problem, target, heads, changes)


def ov(seed: int, *, hard: bool, kv_heads: int, v_bias: bool = False, o_bias: bool = False) -> Case:
    random, heads = Random(seed), Heads(4, kv_heads, HEAD_DIM)
    v, o = random.affine(kv_heads * HEAD_DIM, HIDDEN, v_bias), random.affine(HIDDEN, 4 * HEAD_DIM, o_bias)
    x = random.tokens(40, HIDDEN, hard=hard)
    later = torch.full((len(x), len(x)), -torch.inf).double().triu(1)
    attention = (random(4, len(x), len(x)) + later).softmax(dim=-1)

    def attend(values: Tensor) -> Tensor:
        values = values.unflatten(-1, (kv_heads, -1)).transpose(0, 1).repeat_interleave(heads.group, dim=0)
        return (attention @ values).transpose(0, 1).flatten(1)

    gradients = random.tokens(30, HIDDEN, hard=hard)
    g = gradients.T @ gradients / len(gradients)
    problem = OVProblem(v, o, heads, moment_of(attend(_affine(v, x))), g)
    target = Target("ov", {"v": _matrix(v), "o": _matrix(o)}, HEAD_DIM, 1, (4 + kv_heads) * HIDDEN)

    def changes(solution: Solution) -> Tensor:
        new = apply(solution.parts["o"], attend(apply(solution.parts["v"], x)))
        return new - _affine(o, attend(_affine(v, x)))

    return Case(problem, target, heads, changes, gradients)


def mlp(seed: int, *, hard: bool, gated: bool, bias: bool = False) -> Case:
    random = Random(seed)
    roles = ("gate", "up") if gated else ("fc_in",)
    inputs = {role: random.affine(WIDTH, HIDDEN, bias) for role in roles}
    output = random.affine(HIDDEN, WIDTH, bias)
    x = random.tokens(80, HIDDEN, hard=hard)

    def hidden(parts: Any) -> Tensor:
        if gated:
            return F.silu(apply(parts["gate"], x)) * apply(parts["up"], x)
        return F.gelu(apply(parts["fc_in"], x))

    role = "down" if gated else "fc_out"
    gradients = random.tokens(30, HIDDEN, hard=hard)
    g = gradients.T @ gradients / len(gradients)
    problem = MLPProblem(inputs, role, output, moment_of(hidden(inputs)), g)
    matrices = {r: _matrix(m) for r, m in (*inputs.items(), (role, output))}
    target = Target("mlp", matrices, WIDTH, 1, len(matrices) * HIDDEN)

    def changes(solution: Solution) -> Tensor:
        return apply(solution.parts[role], hidden(solution.parts)) - _affine(output, hidden(inputs))

    return Case(problem, target, None, changes, gradients)


FACTORIES: dict[str, Callable[..., Case]] = {"projection": projection, "qk": qk, "ov": ov, "mlp": mlp}


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """Makes the problem of a target: ``make_case("qk", seed=1, hard=False, kv_heads=2)``."""

    def make(target: str, *, seed: int = 0, hard: bool = False, **facts: Any) -> Case:
        return FACTORIES[target](seed, hard=hard, **facts)

    return make


def variants(solver: Solver) -> list[dict[str, Any]]:
    """The defaults, and every other word of an option that takes words."""
    found: list[dict[str, Any]] = [{}]
    for name, option in solver.options.items():
        if get_origin(option.annotation) is Literal:
            found += [{name: word} for word in get_args(option.annotation) if word != option.default]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test every solver of every method, in all its variants, on every case of its target."""
    if {"method", "target", "facts", "options"} <= set(metafunc.fixturenames):
        from lrc.methods import methods

        found = []
        for name, method in methods().items():
            for target, solver in method.solvers.items():
                for kind, facts in CASES:
                    for options in variants(solver) if kind == target else []:
                        told = [f"{k}={v}" for k, v in (options | facts).items()]
                        found.append(
                            pytest.param(name, target, facts, options, id="-".join([name, target, *told]))
                        )
        metafunc.parametrize(("method", "target", "facts", "options"), found)
