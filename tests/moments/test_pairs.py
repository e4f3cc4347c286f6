"""From scores to the pairs that go: the Gram matrix of their shares, and backward elimination in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from lrc.checkpoint.reader import CheckpointReader
from lrc.families import Heads
from lrc.hub.names import ASSETS
from lrc.maths.linalg import eliminate
from lrc.moments.attention import QUERIES, Attention, AttentionSum
from lrc.text.blocks import tokenize
from lrc.walk.stream import ModelStream
from lrc.walk.walk import Walk

HEADS, KV_HEADS, HEAD_DIM, TOKENS = 4, 2, 16, QUERIES


def keyed(seed: int, size: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, TOKENS, HEAD_DIM, generator=generator) for n in (HEADS, KV_HEADS))
    # Neighbouring dimensions are alike, so that pairs have something to do with each other.
    mix = 0.7 ** (torch.arange(HEAD_DIM)[:, None] - torch.arange(HEAD_DIM)).abs()
    return size * q @ mix, k @ mix


def pairs_of(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    total = AttentionSum(Heads(HEADS, KV_HEADS, HEAD_DIM, "half"), HEAD_DIM**-0.5, torch.device("cpu"))
    total.add(q, k, mask)
    pairs = total.moment().pairs
    assert pairs is not None
    return pairs.double()


def divergence(q: Tensor, k: Tensor, kept: Tensor, seen: Tensor) -> Tensor:
    """Mean KL over queries of keeping pairs (kv_heads, n) of every head, summed over the group: (kv_heads,)."""
    half = HEAD_DIM // 2
    found = []
    for head in range(HEADS):
        columns = torch.cat([kept[head // 2], kept[head // 2] + half])
        keys, queries = k[head // 2].double(), q[head].double()
        old = (queries @ keys.T * HEAD_DIM**-0.5).masked_fill(~seen[head], -torch.inf)
        new = (queries[:, columns] @ keys[:, columns].T * HEAD_DIM**-0.5).masked_fill(~seen[head], -torch.inf)
        old, new = old.log_softmax(-1), new.log_softmax(-1)
        found.append(torch.where(seen[head], old.exp() * (old - new), 0.0).sum(-1).mean())
    return torch.stack(found).unflatten(0, (KV_HEADS, -1)).sum(dim=1)


def masks() -> dict[str, tuple[Tensor | None, Tensor]]:
    """What a model may hand its attention, and what each head (heads, tokens, tokens) sees by it."""
    causal = torch.ones(TOKENS, TOKENS).tril().bool()
    windows = torch.stack([causal & ~torch.ones(TOKENS, TOKENS).tril(-w).bool() for w in (3, 5, 8, 12)])
    added = torch.zeros(TOKENS, TOKENS).masked_fill(~causal, -torch.inf)
    return {
        "none": (None, causal.expand(HEADS, -1, -1)),
        "boolean": (causal[None], causal.expand(HEADS, -1, -1)),
        "added": (added[None], causal.expand(HEADS, -1, -1)),
        "boolean by head": (windows, windows),
        "added by head": (torch.zeros(windows.shape).masked_fill(~windows, -torch.inf), windows),
    }


@pytest.mark.parametrize("kind", masks())
def test_predicts_the_divergence_of_small_losses(kind):
    mask, seen = masks()[kind]
    q, k = keyed(0, size=0.02)
    gram, half = pairs_of(q, k, mask), torch.arange(HEAD_DIM // 2)
    for kept in (half[:6], half[2:], half[::2]):
        lost = torch.ones(len(half)).double().index_fill(0, kept, 0)
        measured = divergence(q, k, kept.expand(KV_HEADS, -1), seen)
        assert 1e-5 < measured.max() < 0.01
        torch.testing.assert_close(
            torch.einsum("i,hij,j->h", lost, gram, lost) / 2, measured, rtol=0.02, atol=0
        )


def grams_of_the_built_in_model() -> Tensor:
    """Of every key head of every layer, (heads, 16, 16), on 4 blocks of its text."""
    reader = CheckpointReader(ASSETS / "tiny-llama")
    ids = tokenize(
        AutoTokenizer.from_pretrained(reader.folder),
        (ASSETS / "calibration.txt").read_text(encoding="utf-8")[:20_000],
    )
    stream = ModelStream(reader, torch.device("cpu"), torch.float32)
    found = []
    for visit in Walk(stream, stream.embed([ids[: 4 * 256].view(4, 256)])):
        attention = Attention(visit.layer, ["qk"])
        visit.observe(attention)
        pairs = attention.result()["qk"].pairs
        assert pairs is not None
        found.append(pairs.double())
    return torch.cat(found)


def test_elimination_is_near_the_best_of_all_sets_and_beats_the_diagonal():
    """On what real weights give: with random ones the greedy way may miss the best by a third."""
    grams, count = grams_of_the_built_in_model(), 16
    sets = ((torch.arange(2**count)[:, None] >> torch.arange(count)) & 1).double()  # of pairs that go
    sizes = sets.sum(dim=1)
    for gram in grams:
        costs = ((sets @ gram) * sets).sum(dim=1)
        for dropped in (2, 6, 10, 14):

            def cost(kept: Tensor, gram: Tensor = gram) -> float:
                gone = torch.ones(count).double().index_fill(0, kept, 0)
                return float(gone @ gram @ gone)

            greedy = cost(eliminate(gram, count - dropped))
            assert greedy <= 1.1 * float(costs[sizes == dropped].min())
            assert greedy <= cost(gram.diagonal().topk(count - dropped).indices) + 1e-12
