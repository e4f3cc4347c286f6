"""Spectra and conditioning against singular values of the whole matrices, worked out from the model's own inputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lrc.inspection.spectrum import conditioning, effective_rank, spectrum, stable_rank
from lrc.moments.moment import Moment
from lrc.records.inspection import Spectrum

SITES = {"q": "self_attn.q_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj"}


def agrees(found: Spectrum, values: Tensor) -> None:
    """Hold a record against singular values (heads, n) by the formulas as papers write them."""
    values = values if values.ndim > 1 else values.unsqueeze(0)
    p = values / values.sum(dim=1, keepdim=True)
    entropies = [-sum(float(x) * math.log(float(x)) for x in row if x > 1e-14) for row in p]
    assert found.effective_rank == pytest.approx(np.mean(np.exp(entropies)), rel=1e-3)
    assert found.stable_rank == pytest.approx(
        float((values.square().sum(1) / values[:, 0] ** 2).mean()), rel=1e-3
    )
    squares = values.square().sum(dim=0)
    assert found.full == values.shape[1]
    assert found.ranks[0] == 1
    assert found.ranks[-1] == found.full
    assert squares[: found.rank_99].sum() >= 0.989 * squares.sum()
    assert squares[: found.rank_99 - 1].sum() < 0.991 * squares.sum()
    expected = [float(squares[:rank].sum() / squares.sum()) for rank in found.ranks]
    assert found.energy == pytest.approx(expected, rel=1e-4)


def root(second: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(second)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def test_spectra_with_rotary_positions_and_shared_keys(
    tiny_checkpoint: Any, inspected: Any, find: Any, weights: Any, linear_inputs: Any
) -> None:
    folder = tiny_checkpoint("llama")
    found, w, seen = inspected(folder), weights(folder, 1), linear_inputs(folder)
    x = {role: seen[f"model.layers.1.{name}"] for role, name in SITES.items()}
    x |= {"k": x["q"], "v": x["q"], "up": x["gate"]}
    for role in ("q", "k", "v", "o", "gate", "up", "down"):
        one = find(found, 1, role)
        agrees(one.plain, torch.linalg.svdvals(w[role]))
        agrees(one.whitened, torch.linalg.svdvals(w[role] @ root(moment(x[role]))))
    q, k, v, o = (
        w["q"].view(4, 8, 32),
        w["k"].view(2, 8, 32),
        w["v"].view(2, 8, 32),
        w["o"].view(32, 4, 8).transpose(0, 1),
    )
    c = root(moment(x["q"]))
    heads = [(h, h // 2) for h in range(4)]
    qk = find(found, 1, "qk")
    agrees(qk.plain, torch.stack([torch.linalg.svdvals(q[h].T @ k[g])[:8] for h, g in heads]))
    agrees(qk.whitened, torch.stack([torch.linalg.svdvals(c @ q[h].T @ k[g] @ c)[:8] for h, g in heads]))
    ov = find(found, 1, "ov")
    agrees(ov.plain, torch.stack([torch.linalg.svdvals(o[h] @ v[g])[:8] for h, g in heads]))
    slices = x["o"].view(-1, 4, 8)
    agrees(
        ov.whitened, torch.stack([torch.linalg.svdvals(o[h] @ root(moment(slices[:, h]))) for h in range(4)])
    )
    mlp = find(found, 1, "mlp")
    norms = w["down"].norm(dim=0)
    agrees(mlp.plain, norms.sort(descending=True).values)
    agrees(mlp.whitened, (norms * x["down"].square().mean(0).sqrt()).sort(descending=True).values)


def test_spectra_beside_biases_are_about_the_mean(
    tiny_checkpoint: Any, inspected: Any, find: Any, weights: Any, linear_inputs: Any
) -> None:
    folder = tiny_checkpoint("gpt2")
    found, w, seen = inspected(folder), weights(folder, 0), linear_inputs(folder)
    x, z, h = (seen[f"transformer.h.0.{n}"] for n in ("attn.c_attn", "attn.c_proj", "mlp.c_proj"))
    centred = x - x.mean(0)
    agrees(find(found, 0, "q").whitened, torch.linalg.svdvals(w["q"] @ root(moment(centred))))
    q, k = (x @ w[r].T + w[f"{r}.bias"] for r in "qk")
    pairs = [
        (moment(q.view(-1, 4, 8)[:, i]), moment(k.view(-1, 4, 8)[:, i])) for i in range(4)
    ]  # E[q qᵀ] and E[k kᵀ], biases in
    agrees(
        find(found, 0, "qk").whitened,
        torch.stack([torch.linalg.svdvals(root(a) @ root(b)) for a, b in pairs]),
    )
    o = w["o"].view(32, 4, 8).transpose(0, 1)
    slices = (z - z.mean(0)).view(-1, 4, 8)
    values = torch.stack([torch.linalg.svdvals(o[i] @ root(moment(slices[:, i]))) for i in range(4)])
    agrees(find(found, 0, "ov").whitened, values)
    scores = h.std(0, unbiased=False) * w["fc_out"].norm(dim=0)
    agrees(find(found, 0, "mlp").whitened, scores.sort(descending=True).values)
    sites = {(m.layer, m.site): m for m in found.moments}
    assert len(sites) == len(found.moments) == 8
    for site, inputs in (("attn_in", x), ("o_in", z), ("down_in", h)):
        values = torch.linalg.eigvalsh(moment(inputs - inputs.mean(0)))
        one = sites[0, site]
        assert (one.centred, one.tokens, one.width) == (True, 128, inputs.shape[1])
        added = one.damping * float(values.mean())
        expected = float((values[-1] + added) / (values[0] + added))
        # Behind a norm one direction is empty, and holds what float32 sums round.
        assert one.damped == pytest.approx(expected, rel=1e-3 if expected < 1e5 else 0.2)


def test_tables_are_weighted_by_the_text(
    tiny_checkpoint: Any, inspected: Any, find: Any, blocks: Tensor
) -> None:
    from safetensors.torch import load_file

    folder = tiny_checkpoint("llama", tie_word_embeddings=False)
    found = inspected(folder, targets=["embed", "lm_head"])
    assert (found.layers, found.moments) == ([], [])
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].double()
    counts = torch.bincount(blocks.flatten(), minlength=256) + 1
    embed = find(found, None, "embed")
    agrees(embed.plain, torch.linalg.svdvals(table))
    shares = (counts / counts.sum()).double().sqrt().unsqueeze(1)
    agrees(embed.whitened, torch.linalg.svdvals(shares * table))
    assert {e.method for e in find(found, None, "lm_head").estimates} >= {"svd", "whitened_svd", "monarch"}


def test_ranks_of_what_is_known() -> None:
    flat, one, none = torch.ones(6), torch.tensor([2.0, 0.0, 0.0]), torch.zeros(3)
    assert float(effective_rank(flat)) == pytest.approx(6)
    assert [float(effective_rank(v)) for v in (one, none)] == pytest.approx([1, 0])
    assert [float(stable_rank(v)) for v in (flat, one, none)] == pytest.approx([6, 1, 0])
    assert spectrum(none.double()).energy == [0.0, 0.0, 0.0]
    long = spectrum(torch.linspace(5000, 1, 5000, dtype=torch.float64))
    assert len(long.ranks) <= 64
    assert (long.ranks[0], long.ranks[-1], long.energy[-1]) == (1, 5000, pytest.approx(1))


def test_a_singular_moment_says_so() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        3, 8, generator=torch.Generator().manual_seed(1)
    )
    found = conditioning(2, "o_in", Moment(moment(x), x.mean(0), 50), centred=False)
    assert found.numerical_rank == 3
    assert found.condition > 1e6
    assert 1e5 < found.damped < 1e7
    dead = conditioning(0, "o_in", Moment(torch.zeros(4, 4), torch.zeros(4), 50), centred=False)
    assert (dead.numerical_rank, dead.condition, dead.damped) == (0, math.inf, 1.0)
