"""Compressed checkpoints load through transformers and compute what their stock equals compute."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import lrc
from lrc.errors import UserError
from lrc.families import families, family_of
from lrc.modules import attention
from lrc.modules.attention import ReducedAttention
from lrc.modules.table import apply_table

# Every family passes the tests of its contract; these hold two to all that transformers does with a model.
FAMILIES = ("gpt2", "llama")
Make = Callable[..., Any]


def ids(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(3))


def logits(model: PreTrainedModel, tokens: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **kwargs).logits


def load(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def quantization_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def equal(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("change", ["full", "attention", "mlp", "factors", "all"])
@pytest.mark.parametrize("family", sorted(families()))
def test_logits_equal_the_stock_model(compressed: Make, family: str, change: str) -> None:
    made = compressed(family, change)
    tokens = ids()
    for implementation in ("eager", "sdpa") if families()[family].sdpa else ("eager",):
        model = load(made.folder, attn_implementation=implementation)
        made.stock.set_attn_implementation(implementation)
        same = equal if change == "full" else close  # "full": nothing is reduced
        same(logits(model, tokens), logits(made.stock, tokens))
    if change != "full":
        original = load(made.source)
        assert (logits(original, tokens) - logits(model, tokens)).abs().max() > 0.1


def test_inverse_layer_scale_of_gpt2_is_kept(compressed: Make) -> None:
    made = compressed("gpt2", "attention", scale_attn_by_inverse_layer_idx=True)
    close(logits(load(made.folder), ids()), logits(made.stock, ids()))


def test_llama3_rope_is_kept(compressed: Make) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    made = compressed("llama", "attention", rope_parameters=rope)
    close(logits(load(made.folder), ids()), logits(made.stock, ids()))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_caches_is_greedy_without(compressed: Make, family: str, implementation: str) -> None:
    model = load(compressed(family, "all").folder, attn_implementation=implementation)
    tokens = ids()
    greedy: dict[str, Any] = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8, "pad_token_id": 0}
    expected = tokens
    for _ in range(8):
        scores = logits(model, expected)[:, -1]
        scores[:, model.generation_config.eos_token_id] = -torch.inf
        expected = torch.cat([expected, scores.argmax(-1, keepdim=True)], dim=1)
    for cache in ({}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}):
        assert torch.equal(model.generate(tokens, **greedy, **cache), expected), cache
    chunked = model.generate(
        tokens, **greedy, cache_implementation="static", disable_compile=True, prefill_chunk_size=4
    )
    assert torch.equal(chunked, expected)


def test_cache_has_the_small_widths(compressed: Make) -> None:
    model = load(compressed("llama", "attention").folder)
    cache = model(input_ids=ids(), use_cache=True).past_key_values
    widths = [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers]
    assert widths == [(6, 3), (4, 5)]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batch_equals_single(compressed: Make, family: str, implementation: str) -> None:
    model = load(compressed(family, "all").folder, attn_implementation=implementation)
    tokens, pad = ids(), 4
    mask = torch.ones_like(tokens)
    tokens[0, :pad], mask[0, :pad] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = logits(model, tokens, attention_mask=mask, position_ids=positions)
    close(together[0, pad:], logits(model, tokens[:1, pad:])[0])
    close(together[1], logits(model, tokens[1:])[0])


def test_dtype_is_honoured(compressed: Make) -> None:
    made = compressed("llama", "all")
    model = load(made.folder, dtype=torch.bfloat16)
    floats = {n: t.dtype for n, t in model.state_dict().items() if not n.endswith("rotary_columns")}
    assert set(floats.values()) == {torch.bfloat16}
    columns = [t for n, t in model.state_dict().items() if n.endswith("rotary_columns")]
    assert [t.dtype for t in columns] == [torch.int64] * 2
    stock = made.stock.to(torch.bfloat16)
    assert (logits(model, ids()) - logits(stock, ids())).abs().max() < 0.05 * logits(stock, ids()).abs().max()


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_device_map(compressed: Make, device_map: str) -> None:
    made = compressed("llama", "all")
    close(logits(load(made.folder, device_map=device_map), ids()), logits(made.stock, ids()))


@pytest.mark.parametrize("family", FAMILIES)
def test_offload_to_disk(compressed: Make, family: str, tmp_path: Path) -> None:
    made = compressed(family, "all")
    split = {name: "cpu" for name, _ in load(made.folder).base_model.named_children()}
    prefix, layers = family_of(family).prefix, family_of(family).layers.split(".")[1]
    split = {f"{prefix}.{name}": where for name, where in split.items() if name != layers}
    split |= {f"{prefix}.{layers}.0": "cpu", f"{prefix}.{layers}.1": "disk", "lm_head": "cpu"}
    model = load(made.folder, device_map=split, offload_folder=tmp_path / "offload")
    close(logits(model, ids()), logits(made.stock, ids()))


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_and_save_round_trip(compressed: Make, family: str, tmp_path: Path) -> None:
    made = compressed(family, "all", shards=3)
    model = load(made.folder)
    before = logits(model, ids())
    close(before, logits(made.stock, ids()))
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "again"), ids()), before)
    assert quantization_config(made.folder) == quantization_config(tmp_path / "again")


@pytest.mark.parametrize(("family", "config"), [("gpt2", {}), ("llama", {"tie_word_embeddings": True})])
def test_tied_embeddings_stay_tied(compressed: Make, family: str, config: dict[str, Any]) -> None:
    made = compressed(family, "all", **config)
    model = load(made.folder)
    assert model.get_input_embeddings().weight is model.get_submodule("lm_head").weight
    close(logits(model, ids()), logits(made.stock, ids()))


@pytest.mark.parametrize("family", FAMILIES)
def test_base_model_and_other_tasks(compressed: Make, family: str) -> None:
    made = compressed(family, "all")
    base = AutoModel.from_pretrained(made.folder)
    with torch.no_grad():
        hidden = base(ids()).last_hidden_state
        close(hidden, made.stock.base_model(ids()).last_hidden_state)
        task = AutoModelForSequenceClassification.from_pretrained(made.folder, num_labels=3, pad_token_id=0)
        close(task.base_model(ids()).last_hidden_state, hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_attentions(compressed: Make, family: str) -> None:
    made = compressed(family, "attention")
    model = load(made.folder, attn_implementation="eager")
    made.stock.set_attn_implementation("eager")
    with torch.no_grad():
        ours, stock = (m(ids(), output_attentions=True).attentions for m in (model, made.stock))
    assert len(ours) == 2
    for mine, theirs in zip(ours, stock, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles(compressed: Make, family: str) -> None:
    model = load(compressed(family, "all").folder)
    expected = logits(model, ids())
    assert torch.equal(logits(copy.deepcopy(model), ids()), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), ids()), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), ids()), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_pickle_loads_where_the_class_is_not_made_yet(
    compressed: Make, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(compressed(family, "attention").folder)
    expected, pickled = logits(model, ids()), pickle.dumps(model)
    monkeypatch.setattr(attention, "_classes", {})
    again = pickle.loads(pickled)
    path = f"{family_of(family).layers}.0.{family_of(family).attention}"
    assert type(again.get_submodule(path)) is not type(model.get_submodule(path))
    assert torch.equal(logits(again, ids()), expected)
    with pytest.raises(AttributeError, match="LrcNothing"):
        _ = attention.LrcNothing


@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains(compressed: Make, family: str) -> None:
    dropout = {"attention_dropout": 0.1} if family == "llama" else {"attn_pdrop": 0.1, "resid_pdrop": 0.1}
    model = load(compressed(family, "all", **dropout).folder)
    newer = "activation_checkpointing_enable"
    getattr(model, newer if hasattr(model, newer) else "gradient_checkpointing_enable")()
    model.train()
    loss = model(ids(), labels=ids()).loss
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias of the keys moves all of a query's scores alike, where no rotation makes it matter.
    assert all(name.endswith("k_proj.bias") for name in without)
    assert model.half().dtype == torch.float16


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_the_family_s_own(compressed: Make, family: str) -> None:
    rates = {"attention_dropout": 0.5} if family == "llama" else {"attn_pdrop": 0.5, "resid_pdrop": 0.5}
    rates |= {} if family == "llama" else {"embd_pdrop": 0.0}
    made = compressed(family, "full", **rates)
    model = load(made.folder, attn_implementation="eager").train()
    made.stock.set_attn_implementation("eager")
    torch.manual_seed(0)
    ours = logits(model, ids())
    torch.manual_seed(0)
    close(ours, logits(made.stock.train(), ids()))
    assert (ours - logits(model.eval(), ids())).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_table_on_one_layer(compressed: Make, family: str) -> None:
    """Compression calls layers before there is a checkpoint: a table applies to one by paths inside it."""
    made = compressed(family, "all")
    about = family_of(family)
    start = f"{about.layers}.1."
    table = quantization_config(made.folder)["modules"]
    local = {path.removeprefix(start): entry for path, entry in table.items() if path.startswith(start)}
    loaded = load(made.folder)
    whole = load(made.source)
    layer = whole.get_submodule(start[:-1])
    apply_table(layer, local, about)
    apply_table(layer, local, about)
    layer.load_state_dict(loaded.get_submodule(start[:-1]).state_dict())
    whole.get_submodule(f"{about.layers}.0").load_state_dict(
        made.stock.get_submodule(f"{about.layers}.0").state_dict()
    )
    assert isinstance(layer.get_submodule(about.attention), ReducedAttention)
    close(logits(whole, ids()), logits(made.stock, ids()))


def test_lrc_load_reads_compressed_and_plain(compressed: Make) -> None:
    made = compressed("llama", "all")
    model = lrc.load(made.folder, device="cpu", dtype=torch.float32)
    assert not model.training
    close(logits(model, ids()), logits(made.stock, ids()))
    assert torch.equal(logits(lrc.load(made.source), ids()), logits(load(made.source), ids()))


def test_a_graph_is_whole_under_compile(compressed: Make) -> None:
    made = compressed("llama", "all")
    compiled = torch.compile(load(made.folder), fullgraph=True, backend="eager")
    with torch.no_grad():
        close(compiled(ids()).logits, logits(made.stock, ids()))


def test_lrc_load_refuses_pickled_weights(compressed: Make) -> None:
    made = compressed("gpt2", "mlp")
    state = load_file(made.source / "model.safetensors")
    (made.source / "model.safetensors").unlink()
    torch.save(state, made.source / "pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors weights"):
        lrc.load(made.source)
    assert logits(lrc.load(made.source, allow_pickle=True), ids()).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vit"}, "is a vit model, not a causal language model"),
        ({"model_type": "lama"}, r"config\.json cannot be used: .*`lama`"),
    ],
)
def test_lrc_load_refuses_other_models(compressed: Make, change: dict[str, str], message: str) -> None:
    folder = edited(compressed("llama", "mlp").source, lambda config: config.update(change))
    with pytest.raises(UserError, match=message):
        lrc.load(folder)


# Without lrc, and damage


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }  # torch would import lrc by its entry point
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result


def test_load_without_lrc_fails_loudly(compressed: Make) -> None:
    """Neither low-rank pairs, nor a narrower MLP, nor split attention may load with random weights."""
    changes = [(f, c) for f in FAMILIES for c in ("factors", "mlp", "attention")] + [("gpt2", "full")]
    script = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        print("loaded")
    except RuntimeError as error:
        print("mismatch" if "ignore_mismatched_sizes" in str(error) else error)
assert "lrc" not in sys.modules
"""
    folders = [str(compressed(family, change).folder) for family, change in changes]
    assert run(script, *folders).stdout.split() == ["mismatch"] * len(changes)


# As when this module imports torch, and torch calls lrc's entry point.
HALF_EXECUTED = """
import sys, types
from importlib.machinery import ModuleSpec
from lrc.hub import register

sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, register._Finder)]
sys.modules[register.TARGET] = half = types.ModuleType(register.TARGET)
half.__spec__ = ModuleSpec(register.TARGET, None)
half.__spec__._initializing = True
register.install()
del sys.modules[register.TARGET]
"""
ORDERS = (
    "import lrc, transformers",
    "import transformers, lrc",
    "import transformers.quantizers.auto, lrc, importlib; importlib.reload(lrc)",
    HALF_EXECUTED,
)


def test_import_orders(compressed: Make) -> None:
    """Each order in a process of its own, forked from one that has torch."""
    script = """
import os, sys, torch
for order in sys.argv[2:]:
    if not os.fork():
        exec(order)
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        print(type(model.model.layers[0].self_attn).__name__, flush=True)
        os._exit(0)
    os.wait()
"""
    folder = compressed("llama", "all").folder
    assert run(script, str(folder), *ORDERS).stdout.split() == ["LrcLlamaAttention"] * len(ORDERS)


def test_import_is_light() -> None:
    run("import lrc, sys; assert not {'torch', 'transformers'} & set(sys.modules)")


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.1.self_attn.rotary_columns",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.gate_proj.bias",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_missing_tensor_is_named(compressed: Make, tensor: str) -> None:
    folder = compressed("llama", "all").folder
    state = load_file(folder / "model.safetensors")
    del state[tensor]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks the tensor {tensor!r}"):
        load(folder)


def test_missing_factor_is_named_and_a_state_dict_is_checked(compressed: Make) -> None:
    folder = compressed("llama", "factors").folder
    state = load_file(folder / "model.safetensors")
    gone = "model.layers.1.self_attn.q_proj.A.weight"
    del state[gone]
    model = load(folder)
    with pytest.raises(UserError, match=gone):
        type(model).from_pretrained(None, config=model.config, state_dict=state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks the tensor {gone!r}"):
        load(folder)


def test_wrong_shape_is_named(compressed: Make) -> None:
    folder = compressed("llama", "factors").folder
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.gate_proj.L"] = state["model.layers.0.mlp.gate_proj.L"][:, :-1].contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError,
        match=r"model\.safetensors: tensor 'model\.layers\.0\.mlp\.gate_proj\.L' has shape \[2, 23, 4\]",
    ):
        load(folder)


def test_truncated_file_is_named(compressed: Make) -> None:
    folder = compressed("gpt2", "all", shards=3).folder
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(
        UserError, match=r"model-00002-of-00003\.safetensors is cut short: tensor '[\w.]+' ends at"
    ):
        load(folder, dtype=torch.float32)
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors"):
        lrc.load(folder)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors"):
        load(folder, dtype=torch.float32)


def edited(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


ENTRY = "model.layers.0.mlp.up_proj"
EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer format": (
        lambda c: c["quantization_config"].update(format_version=2),
        "format version 2.*reads up to 1",
    ),
    "no format": (lambda c: c["quantization_config"].pop("format_version"), "format_version"),
    "unknown kind": (
        lambda c: c["quantization_config"]["modules"][ENTRY].update(kind="low_ranks"),
        "'low_ranks'.*did you mean 'low_rank'.*pip install --upgrade lrc",
    ),
    "unknown path": (
        lambda c: c["quantization_config"]["modules"].update(
            {"model.layers.7.mlp.up_proj": {"kind": "dense"}}
        ),
        "'layers.7.mlp.up_proj'|'model.layers.7.mlp.up_proj'",
    ),
    "no width": (lambda c: c["quantization_config"]["modules"][ENTRY].pop("in"), f"'{ENTRY}' lacks 'in'"),
    "no projection": (
        lambda c: c["quantization_config"]["modules"].pop("model.layers.0.self_attn.o_proj"),
        "'model.layers.0.self_attn' but not its projection 'model.layers.0.self_attn.o_proj'",
    ),
    "tied factorized head": (
        lambda c: (
            c["quantization_config"]["modules"].update(lm_head={"kind": "low_rank"}),
            c.update(tie_word_embeddings=True),
        ),
        "'lm_head' is factorized; set tie_word_embeddings to false",
    ),
    "no columns": (
        lambda c: c["quantization_config"]["modules"]["model.layers.0.self_attn"].update(
            rotary_columns=False
        ),
        "keeps 6 of 8 rotary dimensions",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_bad_config_is_named(compressed: Make, name: str) -> None:
    edit, message = EDITS[name]
    folder = edited(compressed("llama", "all").folder, edit)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_gpt2_refuses_what_it_cannot_run(compressed: Make) -> None:
    folder = edited(compressed("gpt2", "attention").folder, lambda c: c.update(reorder_and_upcast_attn=True))
    with pytest.raises(UserError, match="not supported with reorder_and_upcast_attn=True"):
        load(folder)
