"""What steps do, what they are held against, and that samples are taken in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lrc.benchmark import measure as measuring
from lrc.benchmark.cases import Case
from lrc.benchmark.measure import cache_bytes, measure, weigh, work_of
from lrc.benchmark.steps import Decode, Prefill, Steps
from lrc.modules.fused.fuse import fuse

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
CONFIGS = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])


def make(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@CONFIGS
@torch.no_grad()
def test_decode_goes_on_from_what_is_cached(config: Any) -> None:
    model = make(config)
    run = Decode(model, Case("decode", 3, 10, "eager"), new_tokens=4)
    ids = torch.randint(64, (3, 6))
    run.prepare()
    for layer in run.cache.layers:
        layer.cumulative_length.zero_()
    found = model(ids, **{run.cache_name: run.cache}).logits[:, -1:].argmax(-1)
    assert all(layer.cumulative_length == 6 for layer in run.cache.layers)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[:, 6:]
    run.ids.copy_(found)
    assert torch.equal(run.ids, expected[:, :1])
    run.run()  # four tokens, the last of which attends to ten
    assert torch.equal(run.ids, expected[:, -1:])
    assert all(layer.cumulative_length == 10 for layer in run.cache.layers)
    assert run.tokens == 12
    assert run.seconds() > 0
    assert all(layer.cumulative_length == 10 for layer in run.cache.layers)


@CONFIGS
@torch.no_grad()
def test_operations_of_a_prefill(config: Any) -> None:
    model, case = make(config), Case("prefill", 3, 16, "eager")
    model.set_attn_implementation("eager")  # whose products are plain ones, over all pairs of tokens
    run = Prefill(model, case)
    with FlopCounterMode(display=False) as counter:
        run.run()
    heads, layers, hidden = 4, 2, 32
    unmasked = 2 * 2 * layers * heads * (hidden // heads) * 3
    counted = counter.get_total_flops() - unmasked * 16 * 16 + unmasked * 16 * 17 // 2
    # The rotary angles are a product by name, of a position and a frequency.
    assert counted - work_of(case, weigh(model), run.cache) in range(2 * 16 * 8)


@CONFIGS
def test_bytes_of_a_decode(config: Any) -> None:
    model, case = make(config), Case("decode", 3, 16, "eager")
    run = Decode(model, case, new_tokens=2)
    kv_heads = getattr(config, "num_key_value_heads", None) or 4
    kv = 2 * 2 * kv_heads * 8 * 4
    assert cache_bytes(run.cache) == 3 * 16 * kv
    looked_up = {
        "llama": [model.get_input_embeddings().weight],
        "gpt2": [] if config.model_type == "llama" else [model.transformer.wpe.weight],
    }[config.model_type]  # GPT-2's table of tokens is its head's weight too
    weights = sum(p.nbytes for p in model.parameters())
    assert work_of(case, weigh(model), run.cache) == weights - sum(t.nbytes for t in looked_up) + 3 * 16 * kv


def test_weights_are_the_same_when_they_are_merged() -> None:
    model = make(LLAMA)
    before = weigh(model)
    assert fuse(model) == 4
    assert weigh(model) == before


def test_samples_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    timed: Callable[[Steps], float] = Steps.seconds
    monkeypatch.setattr(Steps, "seconds", lambda run: taken.append(run.model) or timed(run))
    one, other = make(LLAMA), make(LLAMA)
    cases = [Case("prefill", 2, 8, "eager"), Case("decode", 2, 8, "eager")]
    advanced: list[int] = []
    found = measure([one, other], cases, new_tokens=3, repeats=4, advance=lambda: advanced.append(1))
    assert taken == 2 * [one, one, other, other, *(4 * [one, other])]  # two of each do not count
    assert len(advanced) == 2
    for case, sides in zip(cases, found, strict=True):
        for side in sides:
            assert side.low_seconds is not None
            assert side.high_seconds is not None
            assert side.low_seconds <= side.seconds <= side.high_seconds
            assert side.spread == (side.high_seconds - side.low_seconds) / side.seconds
            assert side.tokens == 2 * (8 if case.phase == "prefill" else 3)
            assert side.tokens_per_second == side.tokens / side.seconds
            assert (side.samples, side.peak_bytes) == (4, None)
            assert side.kv_bytes == 2 * 8 * side.kv_bytes_per_token


def test_quartiles() -> None:
    assert measuring._quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert measuring._quartiles([1.0, 2.0, 4.0]) == (1.5, 2.0, 3.0)
    assert measuring._quartiles([5.0, 7.0]) == (None, 6.0, None)  # of two there are none
    assert measuring._quartiles([7.0]) == (None, 7.0, None)
