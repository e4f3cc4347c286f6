"""What docs/checkpoint.md says of PEFT: recipes for dense models work on factorized ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import lrc
from lrc.errors import UserError
from lrc.families import families
from lrc.hub.names import ASSETS

# What PEFT calls in transformers is not ours to mend, nor what it says of GPT-2 and of tied embeddings.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore{which}")
    for which in ("::FutureWarning", "::DeprecationWarning", "::UserWarning")
]

TEXT = str(ASSETS / "heldout.txt")
TOKENS = torch.arange(1, 9)[None]
TEXTS = "calibration: {samples: 3, seq_len: 32}"
PLAN = f"{{method: svd, keep: 0.5, projections: {{embed: {{rank: 12}}, lm_head: {{rank: 12}}}}, {TEXTS}}}"
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def factorized(shared_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output in which every projection, the embedding and the head are pairs."""
    out = tmp_path_factory.mktemp("adapters") / "out"
    source = shared_checkpoint("llama", attention_bias=True)
    lrc.compress(source, PLAN, out=out, calib=TEXT, ppl=[])
    return out


def load(made: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(made.folder)


def adapt(model: Any, target: str | list[str]) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=target, r=2, task_type="CAUSAL_LM"))


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


RECIPES: dict[str, peft.PeftConfig] = {
    "names": peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2),
    "defaults": peft.LoraConfig(task_type="CAUSAL_LM"),
    "all linear": peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=2),
    "dora": peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=2, use_dora=True),
    "pissa": peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=2, init_lora_weights="pissa"),
    "bias": peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=3, lora_bias=True, use_rslora=True),
    "ia3": peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(target_modules=["q_proj"], r=2),
    "adalora": peft.AdaLoraConfig(target_modules=["q_proj", "o_proj"], init_r=4, total_step=10),
    "embedding": peft.LoraConfig(target_modules=["embed_tokens", "lm_head"], r=2),
}


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def train(model: Any) -> list[float]:
    """Losses of three steps; every trained parameter has a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    optimizer, losses = torch.optim.Adam(trained, lr=0.01), list[float]()
    for _ in range(3):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_recipes_for_dense_models_train_save_load_and_merge(
    factorized: Path, tmp_path: Path, recipe: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(factorized)
    before = logits(model)
    adapted: Any = peft.get_peft_model(model, copy.deepcopy(RECIPES[recipe]))
    named = adapted.targeted_module_names
    assert not [name for name in named if name.rpartition(".")[2] in ("A", "B")]
    losses = train(adapted)
    assert losses[-1] < losses[0]
    after = logits(adapted)
    assert not torch.allclose(after, before, atol=1e-4)
    if recipe != "pissa":  # its base weights have changed
        adapted.save_pretrained(tmp_path / "adapter")
        again = AutoModelForCausalLM.from_pretrained(factorized)
        loaded = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
        torch.testing.assert_close(logits(loaded), after, rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), after, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(whole), after, rtol=1e-4, atol=1e-4)
    if recipe in ("names", "all linear"):
        assert whole.model.layers[0].self_attn.q_proj.rank == 8 + 2


def test_a_merged_adapter_can_be_taken_back(factorized: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(factorized)
    before = logits(model)
    adapted: Any = peft.get_peft_model(
        model, peft.LoraConfig(init_lora_weights=False, r=2, task_type="CAUSAL_LM")
    )
    after = logits(adapted)
    adapted.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(adapted), after, rtol=1e-4, atol=1e-4)
    adapted.unmerge_adapter()
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), before, rtol=1e-4, atol=1e-4)


def test_adapters_merge_in_half_precision(factorized: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(factorized, dtype=torch.bfloat16)
    config = peft.LoraConfig(target_modules="all-linear", r=3, init_lora_weights=False)
    adapted: Any = peft.get_peft_model(model, config)
    after = logits(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), after, rtol=0.05, atol=0.05)
    assert merged.model.layers[0].self_attn.q_proj.rank == 8 + 3
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_monarch_factors_take_adapters_but_hold_no_merged_one(compressed: Make, family: str) -> None:
    model = load(compressed(family, "factors"))
    adapted = adapt(model, ["v_proj"])
    losses = train(adapted)
    assert losses[-1] < losses[0]
    with pytest.raises(UserError, match=r"v_proj is stored as monarch .*PeftModel\.from_pretrained"):
        adapted.merge_and_unload()


def test_factors_that_a_head_shares_hold_no_merged_adapter(shared_checkpoint: Any, tmp_path: Path) -> None:
    source = shared_checkpoint("llama", tie_word_embeddings=True)
    plan = f"{{method: svd, keep: 1.0, projections: {{embed: {{rank: 12}}}}, {TEXTS}}}"
    lrc.compress(source, plan, out=tmp_path / "out", calib=TEXT, ppl=[])
    for target in ("embed_tokens", "lm_head"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        adapted: Any = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=[target], init_lora_weights=False)
        )
        with pytest.raises(UserError, match=f"{target} is stored as tied factors"):
            adapted.merge_and_unload()


def test_a_split_projection_says_what_to_name(compressed: Make) -> None:
    model = load(compressed("gpt2", "attention"))
    with pytest.raises(
        ValueError, match="stored as k_proj, o_proj, q_proj, v_proj: name these in target_modules"
    ):
        peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True))


def test_a_weight_is_read_as_a_matrix_and_changed_only_as_a_whole(factorized: Path) -> None:
    pair = AutoModelForCausalLM.from_pretrained(factorized).model.layers[0].mlp.down_proj
    dense = pair.B.weight @ pair.A.weight
    assert pair.weight.shape == dense.shape
    assert pair.state_dict()["weight"].numel() == 0
    torch.testing.assert_close(pair.weight * 1, dense.detach())
    with pytest.raises(UserError, match=r"down_proj is stored as low_rank and cannot hold a new weight"):
        pair.weight.add_(1)
    with pytest.raises(UserError, match=r"down_proj is stored as low_rank"):
        pair.weight = nn.Parameter(torch.randn(dense.shape))
    pair.weight = nn.Parameter(2 * dense)
    torch.testing.assert_close(pair.weight * 1, 2 * dense.detach())


@pytest.mark.parametrize(
    ("family", "change"),
    [*product(sorted(families()), ["attention"]), ("gpt2", "all"), ("llama", "all")],
)
def test_prefixes_are_trained_on_narrow_heads(
    compressed: Make, tmp_path: Path, family: str, change: str
) -> None:
    made = compressed(family, change)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = peft.get_peft_model(load(made), config)
    losses = train(adapted)
    assert losses[-1] < losses[0]
    adapted.save_pretrained(str(tmp_path / "prefix"))
    loaded = peft.PeftModel.from_pretrained(load(made), tmp_path / "prefix")
    torch.testing.assert_close(logits(loaded), logits(adapted))
    # An untrained model may choose the EOS token early.
    greedy: dict[str, Any] = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}
    assert adapted.generate(input_ids=TOKENS, **greedy).shape[1] == TOKENS.shape[1] + 4


@pytest.mark.parametrize("kind", ["prompt", "text", "p-tuning"])
def test_prompts_are_trained_on_a_factorized_embedding(factorized: Path, tmp_path: Path, kind: str) -> None:
    configs = {
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "text": peft.PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=3,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="the sky",
            tokenizer_name_or_path=str(factorized),
        ),
        "p-tuning": peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
        ),
    }
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(factorized), configs[kind])
    losses = train(adapted)
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "prompt")
    again = AutoModelForCausalLM.from_pretrained(factorized)
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "prompt")
    torch.testing.assert_close(logits(loaded), logits(adapted))
