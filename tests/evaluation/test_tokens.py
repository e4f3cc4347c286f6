"""What tokens lose, against distributions written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

from lrc.evaluation import tokens
from lrc.evaluation.tokens import divergence, token_nll


def random(*shape: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(31, (3, 9), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("chunk", [2**28, 4 * 31 * 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_what_the_distributions_say(ids, dtype, chunk, monkeypatch):
    monkeypatch.setattr(tokens, "_CHUNK_BYTES", chunk)
    ours, theirs = (random(3, 9, 31, seed=seed).to(dtype) for seed in (0, 1))
    found = divergence(ours, theirs, ids)
    for window in range(3):
        for place in range(8):
            q, p = (logits[window, place].double().exp() for logits in (ours, theirs))
            q, p = q / q.sum(), p / p.sum()
            kl = sum(pi * math.log(pi / qi) for pi, qi in zip(p.tolist(), q.tolist(), strict=True))
            assert float(found.kl[window, place]) == pytest.approx(kl, abs=1e-5)
            assert bool(found.agree[window, place]) == (int(q.argmax()) == int(p.argmax()))
    assert torch.equal(found.nll, token_nll(ours, ids))
    assert torch.equal(found.nll_against, token_nll(theirs, ids))
    assert 0 < found.agree.sum() + 1 < found.agree.numel()
    assert not torch.allclose(found.kl, divergence(theirs, ours, ids).kl, rtol=0.1)  # it has a direction


def test_of_itself_a_model_loses_nothing(ids):
    logits = random(3, 9, 31, seed=0)
    found = divergence(logits, logits.clone(), ids)
    assert not found.kl.any()
    assert found.agree.all()


def test_what_is_ruled_out_is_infinite_one_way_and_nothing_the_other(ids):
    ours, theirs = random(3, 9, 31, seed=0), random(3, 9, 31, seed=1)
    theirs[..., 7] = -torch.inf
    ids = torch.where(ids == 7, 8, ids)
    assert divergence(ours, theirs, ids).kl.isfinite().all()
    assert (divergence(theirs, ours, ids).kl == torch.inf).all()
    ours[..., 7] = -torch.inf
    theirs[..., 7] = -200.0  # as good as ruled out: its probability is nothing in float32
    assert divergence(ours, theirs, ids).kl.isfinite().all()
