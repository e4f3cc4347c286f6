"""What docs/checkpoint.md says of PEFT: which targets take an adapter, and which do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import lrc  # noqa: F401
from lrc.families import families
from lrc.modules.low_rank import LowRankLinear
from lrc.modules.monarch import MonarchLinear

# What PEFT calls in transformers is not ours to mend; it says fan_in_fan_out of every GPT-2.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore{which}")
    for which in ("::FutureWarning", "::DeprecationWarning", ":fan_in_fan_out")
]

FACTORS = r".*\.[AB]"
Make = Callable[..., Any]


def load(made: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(made.folder)


def adapt(model: Any, target: str | list[str]) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=target, r=2, task_type="CAUSAL_LM"))


def below(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    """Paths of a kind's modules and of all that they hold."""
    return {
        f"{path}.{name}".rstrip(".")
        for path, module in model.named_modules()
        if isinstance(module, kind)
        for name, _ in module.named_modules()
    }


@pytest.mark.parametrize("change", ["attention", "mlp"])
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", {"attention": r".*\.[qkvo]_proj", "mlp": r".*\.(gate|up|down)_proj"}),
        ("gpt2", {"attention": r".*\.[qkvo]_proj", "mlp": r".*\.mlp\.(c_fc|c_proj)"}),
    ],
)
def test_reduced_projections_are_adapted_and_trained(
    compressed: Make, family: str, targets: dict[str, str], change: str
) -> None:
    model = load(compressed(family, change))
    layers = model.config.num_hidden_layers
    tokens = torch.arange(1, 9)[None]
    adapted = adapt(model, targets[change])
    roles = 4 if change == "attention" else {"llama": 3, "gpt2": 2}[family]
    assert len(adapted.targeted_module_names) == layers * roles
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", sorted(families()))
def test_the_pattern_adapts_exactly_the_low_rank_factors(compressed: Make, family: str) -> None:
    model = load(compressed(family, "factors"))
    inner = {path for path in below(model, LowRankLinear) if path.endswith((".A", ".B"))}
    assert inner
    assert set(adapt(model, FACTORS).targeted_module_names) == inner


@pytest.mark.parametrize("family", sorted(families()))
def test_all_linear_adapts_low_rank_factors_and_no_monarch(compressed: Make, family: str) -> None:
    model = load(compressed(family, "factors"))
    inner = {path for path in below(model, LowRankLinear) if path.endswith((".A", ".B"))}
    monarch = below(model, MonarchLinear)
    adapted = set(adapt(model, "all-linear").targeted_module_names)
    assert inner < adapted
    assert monarch
    assert not monarch & adapted


@pytest.mark.parametrize(("role", "kind"), [("q_proj", "LowRankLinear"), ("v_proj", "MonarchLinear")])
def test_a_factorized_projection_itself_is_no_target(compressed: Make, role: str, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"Target module {kind}"):
        adapt(load(compressed("llama", "factors")), [role])
