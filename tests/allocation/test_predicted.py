"""Energy against errors worked out here from the model's inputs; fisher against gradients and errors put together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lrc.allocation import ALLOCATORS
from lrc.allocation.spend import allocate
from lrc.errors import UserError
from lrc.methods import Method, methods
from lrc.methods.contract import Prediction, Problem, Solution, solves
from lrc.methods.sizes import ComponentRank

WHOLE = "{match: 0, qk: keep-all, ov: keep-all, mlp: keep-all}"
BY_SCORE = "mlp: {metric: output, select: score}"  # neurons cut as published


@pytest.mark.parametrize("first_token", [1, 20])
def test_energy_is_the_share_of_the_output_that_is_lost(
    tiny_checkpoint: Any, setting: Any, linear_inputs: Any, blocks: Tensor, first_token: int
) -> None:
    folder, counts = tiny_checkpoint("llama"), torch.ones(blocks.shape, dtype=torch.int64)
    counts[:, 0] = first_token
    first = f"match: 0, qk: keep-all, ov: keep-all, {BY_SCORE}"
    calibration = f"calibration: {{first_token: {first_token}}}"
    plan = setting(folder, f"{calibration}\nlayers: [{{{first}}}, {{match: 1, method: whitened_svd}}]")
    done: list[int] = []
    curves, _ = ALLOCATORS["energy"].curves(plan, done.append)  # type: ignore[arg-type]
    assert sum(done) == 2
    whole = plan.plans[0].whole
    by_target = {(curve.layer, curve.target): curve for curve in curves}
    assert list(by_target) == [
        (0, "mlp"),
        *((1, role) for role in ("q", "k", "v", "o", "gate", "up", "down")),
    ]
    weights = load_file(folder / "model.safetensors")
    inputs = {path: x.repeat_interleave(counts.flatten(), dim=0) for path, x in linear_inputs(folder).items()}
    # Whitened SVD loses the smallest eigenvalues of E[y yᵀ].
    for role, name in (("o", "self_attn.o_proj"), ("up", "mlp.up_proj")):
        y = inputs[f"model.layers.1.{name}"] @ weights[f"model.layers.1.{name}.weight"].double().T
        values = torch.linalg.eigvalsh(y.T @ y).flip(0)
        curve = by_target[1, role]
        shares = [float(values[size:].sum() / values.sum()) for size in curve.sizes]
        assert curve.costs == pytest.approx([curve.whole / whole * share for share in shares], rel=1e-3)
    # The MLP of the first layer is cut by score and fitted again by least squares.
    x, weight = (
        inputs["model.layers.0.mlp.down_proj"],
        weights["model.layers.0.mlp.down_proj.weight"].double(),
    )
    y = x @ weight.T
    curve = by_target[0, "mlp"]
    for size, cost in zip(curve.sizes, curve.costs, strict=True):
        kept = (x.square().mean(dim=0).sqrt() * weight.norm(dim=0)).topk(size).indices
        left = y - x[:, kept] @ torch.linalg.lstsq(x[:, kept], y).solution
        assert cost == pytest.approx(
            curve.whole / whole * float(left.square().sum() / y.square().sum()), rel=1e-3
        )


def test_fisher_is_the_loss_that_methods_predict_whatever_they_minimise(
    tiny_checkpoint: Any, setting: Any, linear_inputs: Any, gradients: Any
) -> None:
    folder = tiny_checkpoint("llama")
    methods = "match: 1, method: svd, o: {method: two_sided_svd}, up: {method: whitened_svd}"
    plan = setting(
        folder, f"layers: [{{match: 0, qk: {{metric: attention}}, {BY_SCORE}}}, {{{methods}}}]", losses=True
    )
    curves, _ = ALLOCATORS["fisher"].curves(plan, lambda done: None)
    by_target = {(curve.layer, curve.target): curve for curve in curves}
    components = [(0, name) for name in ("qk", "ov", "mlp")]
    assert list(by_target) == [
        *components,
        *((1, role) for role in ("q", "k", "v", "o", "gate", "up", "down")),
    ]
    assert all(curve.costs[0] > curve.costs[1] > 0 for curve in curves)
    weights, inputs, fisher = (
        load_file(folder / "model.safetensors"),
        linear_inputs(folder),
        gradients(folder),
    )

    def known(layer: int, role: str, path: str) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, weight and G of a projection."""
        name = f"model.layers.{layer}.{path}"
        return inputs[name], weights[f"{name}.weight"].double(), fisher[layer].outputs[role].double()

    def nats(residual: Tensor, g: Tensor) -> float:
        """Half the mean of rᵀ G r over the tokens' residuals."""
        return float((residual @ g * residual).sum(dim=1).mean()) / 2

    # Two-sided SVD loses the smallest singular values of G^½ W X.
    x, w, g = known(1, "o", "self_attn.o_proj")
    values, vectors = torch.linalg.eigh(g)
    lost = torch.linalg.svdvals(values.clamp_min(0).sqrt().diag() @ vectors.T @ w @ x.T).square() / len(x) / 2
    curve = by_target[1, "o"]
    assert curve.costs == pytest.approx([float(lost[size:].sum()) for size in curve.sizes], rel=1e-2)
    # Whitened SVD keeps the outputs' largest directions, whatever the loss makes of them; plain SVD the weight's.
    x, w, g = known(1, "up", "mlp.up_proj")
    kept = torch.linalg.eigh(w @ x.T @ x @ w.T).eigenvectors.flip(1)
    for size, cost in zip(by_target[1, "up"].sizes, by_target[1, "up"].costs, strict=True):
        y = x @ w.T
        assert cost == pytest.approx(nats(y - y @ kept[:, :size] @ kept[:, :size].T, g), rel=1e-2)
    x, w, g = known(1, "q", "self_attn.q_proj")
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    for size, cost in zip(by_target[1, "q"].sizes, by_target[1, "q"].costs, strict=True):
        tail = u[:, size:] * s[size:] @ vh[size:]
        assert cost == pytest.approx(nats(x @ tail.T, g), rel=1e-3)
    # The MLP is cut by score and fitted again by least squares.
    x, w, g = known(0, "down", "mlp.down_proj")
    size: Any
    for size, cost in zip(by_target[0, "mlp"].sizes, by_target[0, "mlp"].costs, strict=True):
        kept = (x.square().mean(dim=0).sqrt() * w.norm(dim=0)).topk(size).indices
        left = x @ w.T - x[:, kept] @ torch.linalg.lstsq(x[:, kept], x @ w.T).solution
        assert cost == pytest.approx(nats(left, g), rel=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["svd", "whitened_svd", "two_sided_svd", "monarch"])
def test_factors_near_the_weights_of_their_matrix_cost_about_what_the_method_predicts_there(
    tiny_checkpoint: Any, setting: Any, offered: Any, family: str, method: str
) -> None:
    folder, text = tiny_checkpoint(family), f"method: {method}"
    plan = setting(folder, text, (0.3, 0.6, 0.8), losses=True)
    curves, _ = ALLOCATORS["fisher"].curves(plan, lambda done: None)
    exact_curves, _ = ALLOCATORS["fisher"].curves(
        setting(folder, text, (0.95,), losses=True), lambda done: None
    )
    compared = 0
    for offer, exact in zip(offered(plan, curves), exact_curves, strict=True):
        (size,), (weights,), (cost,) = exact.sizes, exact.weights, exact.costs
        if weights > offer.curve.weights[-1]:
            (choice,) = [each for each in offer.choices if each.size == size]
            alone = replace(offer, choices=(choice,))
            assert cost / 2 < allocate([alone], weights).cost < 2 * cost
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize("method", ["a3", "monarch", "two_sided_svd"])
def test_every_method_predicts_a_loss(tiny_checkpoint: Any, setting: Any, method: str) -> None:
    plan = setting(tiny_checkpoint("gpt2"), f"method: {method}", losses=True)
    curves, _ = ALLOCATORS["fisher"].curves(plan, lambda done: None)
    assert all(cost > 0 for curve in curves for cost in curve.costs)


def test_fisher_refuses_a_method_that_predicts_no_loss(
    tiny_checkpoint: Any, setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @solves("mlp", size=ComponentRank(), paper="none")
    def mute(problem: Problem, width: int) -> Solution:
        return Solution({}, Prediction(9.0, 9.0, "output"))

    monkeypatch.setitem(methods(), "mute", Method("mute", "", {"mlp": mute.solver}))  # type: ignore[attr-defined]
    text = "method: mute\ncomponents: {qk: keep-all, ov: keep-all}"
    with pytest.raises(UserError, match="'mute' as it is set predicts none for mlp; allocate by energy"):
        ALLOCATORS["fisher"].curves(setting(tiny_checkpoint("gpt2"), text, losses=True), lambda done: None)


@pytest.mark.parametrize(
    ("allocation", "plan", "sweeps"),
    [
        ("energy", "method: whitened_svd", 0),
        ("energy", f"layers: [{WHOLE}, {{match: 1, method: whitened_svd}}]", 0),
        ("fisher", "method: two_sided_svd", 4),
        ("importance", "method: svd", 4),
    ],
    ids=["energy", "energy of the last layer", "fisher", "importance"],
)
def test_every_block_goes_through_every_layer_once(
    tiny_checkpoint: Any, setting: Any, runs: Any, allocation: str, plan: str, sweeps: int
) -> None:
    """The gradients take one sweep there and one back."""
    one = setting(tiny_checkpoint("llama"), plan, losses=bool(sweeps))
    runs()
    ALLOCATORS[allocation].curves(one, lambda done: None)
    back = {(index, True): sweeps for index in range(2)} if sweeps else {}
    assert runs() == {(0, False): 4 + sweeps, (1, False): 4 + sweeps} | back
