"""Merged products: the same figures and the same weights, whatever is done to the model afterwards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lrc
from lrc.modules import attention
from lrc.modules.fused.fuse import FusedRMSNorm, fuse_norm, unfuse_norm
from lrc.modules.fused.merged import MergesProjections

Make = Callable[..., Any]
TOKENS = torch.arange(24).view(2, 12)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(TOKENS).logits


def merged(model: nn.Module) -> list[MergesProjections]:
    return [m for m in model.modules() if isinstance(m, MergesProjections) and m.merged is not None]


@torch.no_grad()
def in_use(model: nn.Module) -> list[bool]:
    return [module.merged is not None and module.merged.holds() for module in merged(model)]


@pytest.mark.parametrize(
    ("family", "change", "products"),
    [
        ("llama", "full", 4),
        ("llama", "attention", 4),
        ("llama", "mlp", 4),
        ("gpt2", "attention", 2),
        ("gpt2", "full", 2),
    ],
)
def test_the_figures_and_the_weights_stay(compressed: Make, family: str, change: str, products: int) -> None:
    model = lrc.load(compressed(family, change).folder, dtype=torch.float32)
    before, weights = logits(model), {n: t.clone() for n, t in model.state_dict().items()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert lrc.fuse(model) == products
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    assert in_use(model) == [True] * products
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    state = model.state_dict()
    assert list(state) == list(weights)
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    lrc.unfuse(model)
    assert not merged(model)
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    storages = [p.untyped_storage().nbytes() for p in model.parameters() if p.numel()]
    assert storages == [p.nbytes for p in model.parameters() if p.numel()]


def low_rank(compressed: Make, monkeypatch: pytest.MonkeyPatch, bias: bool = True) -> Any:
    """A model all of whose projections are low-rank pairs, with ranks that let some second factors run as one."""
    conftest: Any = __import__("sys").modules[compressed.__module__]
    monkeypatch.setattr(
        conftest, "KINDS", dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), "low_rank")
    )
    return compressed("llama", "factors", attention_bias=bias, mlp_bias=bias)


@pytest.mark.parametrize("bias", [True, False])
def test_low_rank_pairs_run_as_one(compressed: Make, monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    model = lrc.load(low_rank(compressed, monkeypatch, bias).folder, dtype=torch.float32)
    before, calls = logits(model), []
    assert lrc.fuse(model) == 4
    monkeypatch.setattr(torch, "bmm", lambda *given, bmm=torch.bmm: calls.append(1) or bmm(*given))
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    assert len(calls) == 4  # k with v, and gate with up, in two layers


def test_an_original_is_fused_too_and_gets_its_own_classes_back(tiny_checkpoint: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")).eval()
    before, classes = logits(model), [type(module) for module in model.modules()]
    assert lrc.fuse(model) == 4
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    lrc.unfuse(model)
    assert [type(module) for module in model.modules()] == classes
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)
    assert (
        lrc.fuse(AutoModelForCausalLM.from_pretrained(tiny_checkpoint("gpt2"))) == 0
    )  # stored as one already


@pytest.mark.parametrize(("family", "norms"), [("llama", 5), ("gpt2", 0)])
def test_root_mean_square_norms_become_one_kernel(tiny_checkpoint: Make, family: str, norms: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family)).eval()
    lrc.fuse(model)
    lrc.fuse(model)
    assert sum(isinstance(module, FusedRMSNorm) for module in model.modules()) == norms


@torch.no_grad()
def test_a_fused_norm_is_the_familys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    norm: Any = LlamaRMSNorm(48, eps=0.1)  # large enough to be seen
    nn.init.normal_(norm.weight)
    inputs = torch.randn(3, 5, 48)
    expected = norm(inputs)
    rounded = norm(inputs.bfloat16())
    fuse_norm(norm, "variance_epsilon")
    kernels: list[int] = []
    monkeypatch.setattr(F, "rms_norm", lambda *given, run=F.rms_norm: kernels.append(1) or run(*given))
    torch.testing.assert_close(norm(inputs), expected)
    assert kernels == [1]
    assert torch.equal(norm(inputs.bfloat16()), rounded)  # in another precision as before
    with torch.enable_grad():  # and where it is trained
        assert norm(inputs).requires_grad
    assert kernels == [1]
    torch.testing.assert_close(norm.bfloat16()(inputs.bfloat16()).float(), expected, atol=0.05, rtol=0.02)
    unfuse_norm(norm)
    assert type(norm) is LlamaRMSNorm
    assert not {"epsilon", "stock"} & vars(norm).keys()


def test_a_saved_model_is_the_same(compressed: Make, tmp_path: Any) -> None:
    made = compressed("llama", "all")
    model = lrc.load(made.folder, dtype=torch.float32, fuse=True)
    assert merged(model)
    model.save_pretrained(tmp_path / "again")
    again = lrc.load(tmp_path / "again", dtype=torch.float32)
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())
    stored = sum(file.stat().st_size for file in (tmp_path / "again").glob("*.safetensors"))
    assert stored < 1.1 * sum(file.stat().st_size for file in made.folder.glob("*.safetensors"))


def test_gradients_reach_every_parameter_and_steps_are_seen(compressed: Make) -> None:
    folder = compressed("llama", "attention").folder
    fused, apart = (lrc.load(folder, dtype=torch.float32, fuse=fuse) for fuse in (True, False))
    for model in (fused, apart):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(TOKENS, labels=TOKENS).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.numel())
        optimizer.step()
    assert in_use(fused) == [True] * 4
    torch.testing.assert_close(logits(fused), logits(apart), atol=1e-5, rtol=1e-5)


def test_other_weights_hooks_and_modules_are_seen(compressed: Make) -> None:
    model = lrc.load(compressed("llama", "attention").folder, dtype=torch.float32, fuse=True)
    before, layers = logits(model), model.model.layers
    layers[0].self_attn.q_proj.weight.data = torch.zeros_like(layers[0].self_attn.q_proj.weight)
    assert in_use(model) == [False, True, True, True]
    assert not torch.allclose(logits(model), before)
    seen = []
    handle = layers[1].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    logits(model)
    assert seen
    handle.remove()
    layers[1].mlp.gate_proj = nn.Identity()
    assert in_use(model) == [False, True, True, False]


def test_copies_pickles_and_other_precisions(compressed: Make) -> None:
    model = lrc.load(compressed("llama", "attention").folder, dtype=torch.float32, fuse=True)
    before = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not merged(other)
        torch.testing.assert_close(logits(other), before, atol=1e-5, rtol=1e-5)
    model.double()
    assert in_use(model) == [True] * 4
    torch.testing.assert_close(logits(model).float(), before, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of what PEFT calls
def test_adapters_are_not_passed_by(compressed: Make) -> None:
    model = lrc.load(compressed("llama", "attention").folder, dtype=torch.float32, fuse=True)
    before = logits(model)
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    assert in_use(model) == [False] * 4
    assert not torch.allclose(logits(adapted), before)
    whole = adapted.merge_and_unload(safe_merge=True)
    after = logits(whole)
    assert not torch.allclose(after, before)
    lrc.fuse(whole)
    assert in_use(whole) == [True] * 4
    torch.testing.assert_close(logits(whole), after, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of what PEFT calls
@pytest.mark.parametrize("saved", [["post_attention_layernorm"], ["post_attention_layernorm", "lm_head"]])
def test_norms_that_an_adapter_trains_stay_as_they_are(compressed: Make, saved: list[str]) -> None:
    model = lrc.load(compressed("llama", "attention").folder, dtype=torch.float32)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=saved, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    before = logits(adapted)
    lrc.fuse(model)
    torch.testing.assert_close(logits(adapted), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", ["attention", "all"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_heads_are_padded_to_what_kernels_take(
    compressed: Make, monkeypatch: pytest.MonkeyPatch, family: str, change: str
) -> None:
    model: Any = lrc.load(compressed(family, change).folder, dtype=torch.float32)
    with torch.no_grad():
        before = model(TOKENS, use_cache=True)
        narrow = model(TOKENS[:, :1], past_key_values=before.past_key_values).logits
        monkeypatch.setattr(attention, "STEP", {"cpu": 8})
        after = model(TOKENS, use_cache=True)
        widths = {t.shape[-1] for layer in after.past_key_values.layers for t in (layer.keys, layer.values)}
        wide = model(TOKENS[:, :1], past_key_values=after.past_key_values).logits
    assert widths == {8}
    torch.testing.assert_close(after.logits, before.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wide, narrow, atol=1e-5, rtol=1e-5)
