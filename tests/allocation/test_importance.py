"""Importance against a global sort of all directions, done here from the model's own weights and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lrc.allocate import allocate
from lrc.allocation import importance
from lrc.allocation.sizing import Limits
from lrc.errors import UserError
from lrc.moments.gradient import GradientMoment

PATHS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
Directions = dict[tuple[int, str], Tensor]


def directions(
    folder: Path, inputs: dict[str, Tensor], gradients: Mapping[int, GradientMoment]
) -> Directions:
    """What dropping each direction of every matrix costs in nats, largest first, by a full SVD."""
    weights = load_file(folder / "model.safetensors")
    found = {}
    for layer in range(2):
        for role, path in PATHS.items():
            name = f"model.layers.{layer}.{path}"
            u, s, vh = torch.linalg.svd(weights[f"{name}.weight"].double(), full_matrices=False)
            x = inputs[name]
            taken = (x @ vh.T).square().mean(dim=0)  # vᵀ C v
            heard = torch.einsum("or,op,pr->r", u, gradients[layer].outputs[role].double(), u)  # uᵀ G u
            scores = s.square() * taken * heard / 2
            found[layer, role] = scores.sort(descending=True).values
    return found


def cut(
    scores: Directions, units: dict[tuple[int, str], int], largest: dict[tuple[int, str], int], budget: int
) -> dict[tuple[int, str], int]:
    """Ranks after taking directions in the order of score per weight until the first that does not fit."""
    order = sorted(
        ((float(score) / units[key], key) for key, all_of_it in scores.items() for score in all_of_it),
        reverse=True,
    )
    ranks = dict.fromkeys(scores, 1)  # a pair has one direction at least
    left = budget - sum(units.values())
    taken = dict.fromkeys(scores, 0)
    for _, key in order:
        taken[key] += 1
        if taken[key] == 1 or taken[key] > largest[key]:
            continue
        if units[key] > left:
            break
        left -= units[key]
        ranks[key] += 1
    return ranks


@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_allocate_cuts_the_globally_sorted_directions_at_the_budget(
    tiny_checkpoint: Any, setting: Any, linear_inputs: Any, gradients: Any, keep: float
) -> None:
    folder = tiny_checkpoint("llama")
    found = importance.costs(setting(folder, "method: svd", losses=True), lambda done: None)
    assert found.unit == "predicted nats"
    assert found.loss is None
    expected = directions(folder, linear_inputs(folder), gradients(folder))
    for curve in found.curves:
        scores = expected[curve.layer, curve.target]
        assert curve.sizes == tuple(range(1, len(curve.sizes) + 1))
        assert curve.sizes[-1] * curve.unit < curve.whole <= (curve.sizes[-1] + 1) * curve.unit
        tails = [float(scores[size:].sum()) for size in curve.sizes]
        assert curve.costs == pytest.approx(tails, rel=1e-4)
    # Below a whole matrix, which is one large step at the end.
    curves = [Limits(cap=0.95).on(curve) for curve in found.curves]
    budget = int(keep * sum(curve.whole for curve in curves))
    units = {(curve.layer, curve.target): curve.unit for curve in curves}
    largest = {(curve.layer, curve.target): curve.legal[-1] for curve in curves}
    bought = allocate(curves, budget)
    ranks = dict(zip(units, bought.sizes, strict=True))
    sorted_cut = cut(expected, units, largest, budget)
    assert sum(abs(ranks[key] - sorted_cut[key]) for key in ranks) <= 2  # up to the last direction
    assert budget - bought.weights < max(units.values())


def test_components_have_no_singular_directions(tiny_checkpoint: Any, setting: Any) -> None:
    plan = setting(tiny_checkpoint("gpt2"), "layers: [{match: 1, method: svd}]")
    with pytest.raises(UserError, match=r"qk under 'a3' has none.*fisher"):
        importance.blank(plan.reader.architecture, plan.plans)
