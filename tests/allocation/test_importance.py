"""Importance against a global sort of all directions, done here from the model's own weights and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lrc.allocation import ALLOCATORS
from lrc.allocation.sizing import Limits
from lrc.allocation.spend import allocate
from lrc.errors import UserError
from lrc.moments.gradient import GradientMoment

LLAMA = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
GPT2 = {
    "q": "attn.c_attn",
    "k": "attn.c_attn",
    "v": "attn.c_attn",
    "o": "attn.c_proj",
    "fc_in": "mlp.c_fc",
    "fc_out": "mlp.c_proj",
}
Key = tuple[int | None, str]
Directions = dict[Key, Tensor]


def matrices(folder: Path, family: str) -> dict[tuple[int, str], tuple[str, Tensor]]:
    """Path and (out, in) weight of every projection, by layer and role."""
    weights, found = load_file(folder / "model.safetensors"), {}
    for layer in range(2):
        if family == "llama":
            for role, path in LLAMA.items():
                name = f"model.layers.{layer}.{path}"
                found[layer, role] = name, weights[f"{name}.weight"]
            continue
        for role, path in GPT2.items():
            name = f"transformer.h.{layer}.{path}"
            weight = weights[f"{name}.weight"].T
            found[layer, role] = name, weight.chunk(3)["qkv".index(role)] if role in "qkv" else weight
    return found


def directions(
    folder: Path, family: str, inputs: dict[str, Tensor], gradients: Mapping[int, GradientMoment]
) -> Directions:
    """What dropping each direction of every matrix costs in nats, largest first, by a full SVD.

    All projections of gpt2 have a bias, which makes up for the mean of what is lost.
    """
    found = {}
    for (layer, role), (name, weight) in matrices(folder, family).items():
        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        x = inputs[name] - (inputs[name].mean(dim=0) if family == "gpt2" else 0)
        taken = (x @ vh.T).square().mean(dim=0)  # vᵀ C v
        heard = torch.einsum("or,op,pr->r", u, gradients[layer].outputs[role].double(), u)  # uᵀ G u
        scores = s.square() * taken * heard / 2
        found[layer, role] = scores.sort(descending=True).values
    return found


def cut(scores: Directions, units: dict[Key, int], largest: dict[Key, int], budget: int) -> dict[Key, int]:
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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_allocate_cuts_the_globally_sorted_directions_at_the_budget(
    tiny_checkpoint: Any,
    setting: Any,
    offered: Any,
    linear_inputs: Any,
    gradients: Any,
    keep: float,
    family: str,
) -> None:
    folder = tiny_checkpoint(family)
    plan = setting(folder, "method: svd", losses=True)
    curves, loss = ALLOCATORS["importance"].curves(plan, lambda done: None)
    assert loss is None
    expected = directions(folder, family, linear_inputs(folder), gradients(folder))
    for curve in curves:
        scores = expected[curve.layer, curve.target]
        assert curve.sizes == tuple(range(1, len(curve.sizes) + 1))
        assert curve.weights[-1] < curve.whole <= curve.weights[-1] + curve.weights[0]
        tails = [float(scores[size:].sum()) for size in range(1, len(curve.sizes) + 1)]
        assert curve.costs == pytest.approx(tails, rel=1e-4)
    # Below a whole matrix, which is one large step at the end.
    offers = offered(plan, curves, Limits(cap=0.95))
    budget = int(keep * sum(curve.whole for curve in curves))
    units = {(offer.curve.layer, offer.curve.target): offer.choices[0].weights for offer in offers}
    largest = {(offer.curve.layer, offer.curve.target): offer.choices[-1].width for offer in offers}
    bought = allocate(offers, budget)
    ranks = dict(zip(units, (choice.width for choice in bought.choices), strict=True))
    sorted_cut = cut(expected, units, largest, budget)
    assert sum(abs(ranks[key] - sorted_cut[key]) for key in ranks) <= 2  # up to the last direction
    assert budget - bought.weights < max(units.values())


def test_components_have_no_singular_directions(tiny_checkpoint: Any, setting: Any) -> None:
    plan = setting(tiny_checkpoint("gpt2"), "layers: [{match: 1, method: svd}]")
    with pytest.raises(UserError, match=r"qk under 'a3' has none.*fisher"):
        ALLOCATORS["importance"].blank(plan.reader.architecture, plan.plans)
