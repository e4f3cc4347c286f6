"""An output beside its original: products, errors and subspaces worked out here from whole matrices and all tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lrc.compression import loop
from lrc.inspection.output import overlap, product_difference
from lrc.records.inspection import OutputErrors

ROOT = "model.layers.1."


def held(found: Any, find: Any, layer: int | None, target: str) -> OutputErrors:
    one = find(found, layer, target).output
    assert one is not None
    return one


def relative(change: Tensor, of: Tensor) -> float:
    return float(change.norm() / of.norm())


def stored(folder: Path, name: str) -> Tensor:
    return load_file(folder / "model.safetensors")[name].double()


def root(second: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(second)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def test_pairs_by_their_products_and_the_inputs_they_keep(
    tiny_checkpoint: Any, inspected: Any, find: Any, output: Any, weights: Any, linear_inputs: Any
) -> None:
    folder = tiny_checkpoint("llama")
    out = output(folder, "keep: 0.5\nmethod: svd\nrefit: none")
    found = inspected(folder, against=out)
    w, seen = weights(folder, 1), linear_inputs(folder)
    for role, name in (("q", "self_attn.q_proj"), ("gate", "mlp.gate_proj"), ("down", "mlp.down_proj")):
        one, x = held(found, find, 1, role), seen[ROOT + name]
        a, b = (stored(out, f"{ROOT}{name}.{f}.weight") for f in "AB")
        delta = w[role] - b @ a
        assert (one.method, one.size) == ("svd", len(a))
        assert one.reconstruction == pytest.approx(relative(delta, w[role]), rel=1e-9)
        assert one.data_error == pytest.approx(relative(x @ delta.T, x @ w[role].T), rel=1e-5)
        assert one.measured == pytest.approx(one.data_error, rel=1e-4)
        assert one.recorded_predicted == pytest.approx(one.data_error, rel=1e-4)
        assert one.recorded_measured == pytest.approx(one.data_error, rel=0.2)  # of one block of the four
        # In coordinates whitened by the symmetric root, which are those by any other root but turned.
        half = root(x.T @ x / len(x))
        best = torch.linalg.svd(w[role] @ half).Vh[: len(a)]
        kept = torch.linalg.svd(a @ half, full_matrices=False).Vh
        cosines = torch.linalg.svdvals(best @ kept.T)
        assert one.overlap == pytest.approx(float(cosines.square().mean()), abs=1e-4)
        assert one.angle == pytest.approx(math.degrees(math.acos(min(float(cosines[-1]), 1.0))), abs=0.2)


def test_the_method_of_the_metric_keeps_the_best_inputs(
    tiny_checkpoint: Any, inspected: Any, find: Any, output: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrc.plan.resolve.TOKENS_PER_FIRST", 4)  # so that first tokens count as 8 throughout
    folder = tiny_checkpoint("gpt2")
    found = inspected(folder, against=output(folder, "keep: 0.5\nmethod: whitened_svd\nrefit: none"))
    for role in ("q", "k", "v", "o", "fc_in", "fc_out"):
        one = held(found, find, 0, role)
        assert one.overlap == pytest.approx(1, abs=1e-4)
        assert one.measured == pytest.approx(one.data_error, rel=1e-3)
        assert one.recorded_predicted == pytest.approx(one.data_error, rel=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_components_by_what_stays_defined(
    family: str,
    tiny_checkpoint: Any,
    inspected: Any,
    find: Any,
    output: Any,
    weights: Any,
    linear_inputs: Any,
) -> None:
    folder = tiny_checkpoint(family)
    out = output(folder, "keep: 0.5\ncomponents: {qk: {metric: score}}\nrefit: none")
    found = inspected(folder, against=out)
    w, seen = weights(folder, 1), linear_inputs(folder)
    start = ROOT if family == "llama" else "transformer.h.1."
    attention = f"{start}self_attn" if family == "llama" else f"{start}attn"
    x = seen[f"{attention}.q_proj" if family == "llama" else f"{attention}.c_attn"]
    group = 2 if family == "llama" else 1
    new = {r: stored(out, f"{attention}.{r}_proj.weight") for r in "qkvo"}
    biases = {
        r: stored(out, f"{attention}.{r}_proj.bias")
        if family == "gpt2"
        else torch.zeros(len(new[r])).double()
        for r in "qk"
    }

    def product(left: Tensor, right: Tensor) -> Tensor:
        """Aᵀ B by head (4, 32, 32), every head of A with the head of B that it shares."""
        a, b = left.view(4, -1, 32), right.view(4 // group, -1, 32).repeat_interleave(group, dim=0)
        return a.mT @ b

    qk, ov, mlp = (held(found, find, 1, name) for name in ("qk", "ov", "mlp"))
    whole = product(w["q"], w["k"])
    assert qk.reconstruction == pytest.approx(relative(whole - product(new["q"], new["k"]), whole), rel=1e-6)
    whole = product(w["o"].T.contiguous(), w["v"])
    changed = product(new["o"].T.contiguous(), new["v"])
    assert ov.reconstruction == pytest.approx(relative(whole - changed, whole), rel=1e-6)
    # Scores of every query with every key, as if they were independent.
    zero = {r: w.get(f"{r}.bias", torch.zeros(len(w[r])).double()) for r in "qk"}

    def scores(q: Tensor, k: Tensor) -> Tensor:
        q, k = (each.view(len(x), heads, -1).transpose(0, 1) for each, heads in ((q, 4), (k, 4 // group)))
        return q @ k.repeat_interleave(group, dim=0).mT

    old = scores(x @ w["q"].T + zero["q"], x @ w["k"].T + zero["k"])
    reduced = scores(x @ new["q"].T + biases["q"], x @ new["k"].T + biases["k"])
    assert qk.data_error == pytest.approx(relative(old - reduced, old), rel=1e-3)
    assert qk.kl is not None
    assert qk.kl > 0
    assert (qk.measured, qk.recorded_unit) == (None, "relative error of scores")
    if family == "gpt2":
        assert qk.recorded_predicted == pytest.approx(qk.data_error, rel=1e-3)
    for one in (ov, mlp):
        assert one.measured == pytest.approx(one.data_error, rel=1e-3)
        assert one.recorded_predicted == pytest.approx(one.data_error, rel=1e-3)
    assert mlp.reconstruction is None
    assert mlp.angle is None
    for one in (qk, ov, mlp):
        assert one.overlap is not None
        assert 0 < one.overlap <= 1 + 1e-9
    if family == "gpt2":  # the optimum of that very metric
        assert qk.overlap == pytest.approx(1, abs=1e-3)


def test_the_published_choices_overlap_with_the_best(
    tiny_checkpoint: Any, inspected: Any, find: Any, output: Any
) -> None:
    folder = tiny_checkpoint("llama", num_key_value_heads=4)
    published = "ov: {metric: output, subspace: stacked}, mlp: {metric: output}"
    found = inspected(folder, against=output(folder, f"keep: 0.5\nrefit: none\ncomponents: {{{published}}}"))
    assert held(found, find, 0, "ov").overlap == pytest.approx(1, abs=1e-4)
    assert held(found, find, 0, "mlp").overlap == 1
    by_loss = inspected(folder, against=output(folder, "keep: 0.5", "loss"))
    other = held(by_loss, find, 0, "mlp").overlap
    assert other is not None
    assert other < 1


def test_what_was_only_fitted_again_is_shown(
    tiny_checkpoint: Any, inspected: Any, find: Any, output: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without held-out blocks every refit is applied.
    monkeypatch.setattr(loop, "held_out_mask", lambda count: torch.zeros(count, dtype=torch.bool))
    folder = tiny_checkpoint("llama")
    found = inspected(folder, against=output(folder, "projections: {q: {method: svd, keep: 0.5}}"))
    o = held(found, find, 1, "o")
    assert (o.method, o.size, o.kept, o.recorded_predicted) == ("refit", None, o.whole, None)
    assert o.reconstruction is not None
    assert 0 < o.reconstruction < 1
    assert o.measured == pytest.approx(o.data_error, rel=1e-3)
    assert find(found, 1, "v").output is None


@pytest.mark.parametrize("tied", [True, False])
def test_tables_of_an_output(
    tied: bool, tiny_checkpoint: Any, inspected: Any, find: Any, output: Any
) -> None:
    folder = tiny_checkpoint("llama", tie_word_embeddings=tied)
    head = "" if tied else ", lm_head: {method: monarch, keep: 0.5}"
    plan = f"refit: none\nprojections: {{embed: {{method: whitened_svd, rank: 8}}{head}}}"
    out = output(folder, plan)
    found = inspected(folder, against=out, targets=["embed"] if tied else ["embed", "lm_head"])
    table = stored(folder, "model.embed_tokens.weight")
    b, a = (stored(out, f"model.embed_tokens.{f}.weight") for f in "BA")
    embed = held(found, find, None, "embed")
    assert embed.reconstruction == pytest.approx(relative(table - b @ a, table), rel=1e-6)
    assert embed.recorded_predicted == pytest.approx(embed.data_error, rel=1e-4)
    if not tied:
        head_held = held(found, find, None, "lm_head")
        assert (head_held.method, head_held.overlap) == ("monarch", None)
        assert embed.overlap == pytest.approx(1, abs=1e-6)


def test_differences_of_products_do_not_cancel() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, *shape, generator=generator).double() for shape in ((9, 4), (4, 7)))
    change = 1e-10 * torch.randn(2, 9, 4, generator=generator).double()
    expected = (change @ b).square().sum(dim=(1, 2))
    assert product_difference(a, b, a + change, b) == pytest.approx(expected, rel=1e-4)


def test_overlap_of_subspaces_at_known_angles() -> None:
    angle = math.radians(30)
    plane = torch.eye(4, dtype=torch.float64)[:, :2]
    turned = plane.clone()
    turned[:, 1] = torch.tensor([0.0, math.cos(angle), math.sin(angle), 0.0])
    assert overlap(plane, turned) == (pytest.approx((1 + 0.75) / 2), pytest.approx(30))
    assert overlap(plane, plane) == (pytest.approx(1), pytest.approx(0, abs=1e-5))
