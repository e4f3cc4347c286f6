from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lrc.families import Heads
from lrc.moments import attention_samples
from lrc.moments.attention import QUERIES, AttentionSum
from lrc.moments.attention_samples import AttentionSamples, SampleSum

CPU, SCALE, HEADS, KV_HEADS, HEAD_DIM = torch.device("cpu"), 0.3, 4, 2, 6


def sequences(count: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = (HEADS, tokens, HEAD_DIM), (KV_HEADS, tokens, HEAD_DIM)
    return [tuple(torch.randn(s, generator=generator) for s in shapes) for _ in range(count)]  # type: ignore[misc]


def summed(parts: list[tuple[Tensor, Tensor]], mask: Tensor | None = None) -> AttentionSum:
    total = AttentionSum(Heads(HEADS, KV_HEADS, HEAD_DIM, "half"), SCALE, CPU)
    for q, k in parts:
        total.add(q, k, mask)
    return total


def sampled(parts: list[tuple[Tensor, Tensor]]) -> AttentionSamples:
    total = SampleSum(SCALE)
    for q, k in parts:
        total.add(q, k, None)
    return total.moment()


def one_by_one(parts: list[tuple[Tensor, Tensor]], seen: Tensor) -> tuple[Tensor, Tensor]:
    """Both statistics, query by query, over sequences short enough that every query counts."""
    covariance = torch.zeros(KV_HEADS, HEAD_DIM, HEAD_DIM).double()
    pairs, half, queries = torch.zeros(KV_HEADS, 3, 3).double(), HEAD_DIM // 2, 0
    for q, k in parts:
        for m in range(q.shape[1]):
            queries += 1
            for head in range(HEADS):
                keys, query = k[head // 2, seen[m]].double(), q[head, m].double()
                p = (keys @ query * SCALE).softmax(dim=0)
                covariance[head // 2] += torch.cov(keys.T, correction=0, aweights=p)
                share = (keys * query)[:, :half] + (keys * query)[:, half:]
                pairs[head // 2] += torch.cov(SCALE * share.T, correction=0, aweights=p)
    return covariance / queries, pairs / queries


@pytest.mark.parametrize("kind", ["none", "boolean", "added"])
def test_is_the_mean_over_queries_of_the_covariance_of_what_they_attend_to(kind):
    parts, causal = sequences(3, QUERIES), torch.ones(QUERIES, QUERIES).tril().bool()
    if kind == "boolean":
        causal = causal & ~torch.ones(QUERIES, QUERIES).tril(-5).bool()  # a window of five
    mask = {
        "none": None,
        "boolean": causal[None],
        "added": torch.zeros(QUERIES, QUERIES).masked_fill(~causal, -torch.inf)[None],
    }[kind]
    moment = summed(parts, mask).moment()
    covariance, pairs = one_by_one(parts, causal)
    assert moment.pairs is not None
    torch.testing.assert_close(moment.covariance.double(), covariance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moment.pairs.double(), pairs, rtol=1e-4, atol=1e-5)
    assert (moment.queries, moment.scale) == (3 * QUERIES, SCALE)


def test_what_all_keys_share_neither_counts_nor_cancels():
    parts = sequences(3, 40)
    moved = [(q, k + 300 * torch.arange(1.0, HEAD_DIM + 1)) for q, k in parts]
    one, other = summed(parts).moment(), summed(moved).moment()
    assert one.pairs is not None
    assert other.pairs is not None
    torch.testing.assert_close(other.covariance, one.covariance, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(other.pairs, one.pairs, rtol=1e-2, atol=1e-3)


def test_half_the_sum_over_a_set_of_pairs_is_the_divergence_of_dropping_it():
    """To second order: scores a hundredth of their size."""
    parts = [(0.1 * q, 0.1 * k) for q, k in sequences(4, QUERIES)]
    moment = summed(parts).moment()
    assert moment.pairs is not None
    dropped = [0, 2]
    predicted = float(moment.pairs[:, dropped][:, :, dropped].sum()) / 2
    later, total = torch.full((QUERIES, QUERIES), -torch.inf).triu(1), 0.0
    for q, k in parts:
        keys, less = k.repeat_interleave(2, dim=0), q.clone()
        less[..., [*dropped, *(j + 3 for j in dropped)]] = 0
        old, new = ((x.double() @ keys.double().mT * SCALE + later).softmax(-1) for x in (q, less))
        total += float(torch.where(old > 0, old * (old.log() - new.log()), 0.0).sum()) / QUERIES
    assert predicted == pytest.approx(total / len(parts), rel=0.01)


def test_samples_are_queries_with_the_covariance_of_what_each_attends_to():
    parts = sequences(3, QUERIES)
    samples = sampled(parts)
    for head in range(HEADS):
        every = [(q[head, m], k[head // 2, : m + 1]) for q, k in parts for m in range(QUERIES)]
        found = samples.q[head // 2, head % 2], samples.covariance[head // 2, head % 2]
        assert len(every) == len(found[0]) == len(found[1])
        for (query, keys), scaled, covariance in zip(every, *found, strict=True):
            p = (keys @ query * SCALE).softmax(dim=0)
            torch.testing.assert_close(scaled, query * SCALE)
            centred = keys - p @ keys
            expected = torch.einsum("n,nd,ne->de", p, centred, centred)
            torch.testing.assert_close(covariance, expected, rtol=1e-4, atol=1e-5)


def test_samples_are_bounded_and_evenly_taken(monkeypatch):
    parts = sequences(11, QUERIES)
    monkeypatch.setattr(
        attention_samples, "SAMPLES", 4 * 2 * QUERIES
    )  # four sequences for two heads a key head
    samples = sampled(parts)
    expected = torch.cat([parts[i][0][1] for i in (0, 4, 8)]) * SCALE
    torch.testing.assert_close(samples.q[0, 1], expected)
