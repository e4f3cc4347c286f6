"""GGUF files, PEFT adapters and quantized checkpoints are read as the full-precision model that they hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants
import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

import lrc
from lrc.cli import app
from lrc.errors import UserError
from lrc.hub import conversion
from lrc.hub.names import dequantized, resolve_model
from lrc.plan.job import open_checkpoint

TensorMap = dict[str, Tensor]
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
IDS = torch.arange(1, 20)[None]
# What PEFT calls in transformers is not ours to mend.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{which}") for which in ("FutureWarning", "UserWarning")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lrc"


def tensors(folder: Path) -> TensorMap:
    return load_file(folder / "model.safetensors")


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **entries}), encoding="utf-8")


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rotary pairs beside one another, as GGUF has them."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(source: Path, file: Path, leave_out: str = "", scaling: float | None = None) -> None:
    """Write a llama checkpoint and its config, without a tokenizer, as llama.cpp does."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling)
    writer.add_vocab_size(config["vocab_size"])
    for name, tensor in tensors(source).items():
        layer, _, inner = name.removeprefix("model.layers.").partition(".")
        stored = GGUF_NAMES.get(name) or f"blk.{layer}.{GGUF_NAMES[inner]}"
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = interleaved(tensor, heads if "q_proj" in name else kv_heads)
        if not leave_out or leave_out not in name:
            writer.add_tensor(stored, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_adapter(base: Path, folder: Path, config: peft.PeftConfig) -> Any:
    """Write an adapter with random weights for a base; return the base with it."""
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(str(folder))
    return model


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **options,
    )


@pytest.fixture
def adapter(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    write_adapter(tiny_checkpoint("llama"), tmp_path / "adapter", lora())
    return tmp_path / "adapter"


def write_fp8(source: Path, folder: Path, rows: int, columns: int) -> TensorMap:
    """Write a checkpoint with matrices of layers in fp8 with a scale for each block; return what they stand for."""
    shutil.copytree(source, folder)
    stored, meant = dict[str, Tensor](), tensors(source)
    for name, weight in tensors(source).items():
        if "_proj" not in name:
            stored[name] = weight
            continue
        blocks = weight.view(weight.shape[0] // rows, rows, -1, columns)
        scale = blocks.abs().amax((1, 3)) / 448
        quantized = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        stored |= {name: quantized.view(weight.shape), f"{name}_scale_inv": scale}
        meant[name] = (quantized.float() * scale[:, None, :, None]).view(weight.shape)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [rows, columns]}
    change(folder / "config.json", quantization_config=method)
    return meant


def test_a_gguf_file_is_its_model_bit_for_bit(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], cache: Path
) -> None:
    source = tiny_checkpoint("llama")
    shutil.copy(source / "tokenizer.json", tmp_path)
    shutil.copy(source / "tokenizer_config.json", tmp_path)
    write_gguf(source, file := tmp_path / "tiny.gguf")
    found = resolve_model(str(file))
    made, expected = tensors(found.path), tensors(source)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert found.path.parent == cache
    assert (found.source, found.name) == (str(file), "tiny")
    assert (found.path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    written = (found.path / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(file)) == found
    assert (found.path / "model.safetensors").stat().st_mtime_ns == written
    write_gguf(tiny_checkpoint("llama", seed=1), file)
    assert resolve_model(str(file)).path != found.path


def test_a_gguf_file_without_a_weight_is_refused_and_leaves_nothing(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], cache: Path
) -> None:
    write_gguf(tiny_checkpoint("llama"), tmp_path / "tiny.gguf", leave_out="1.mlp.up_proj")
    with pytest.raises(UserError, match=r"lacks weights of its model.*layers\.1\.mlp\.up_proj"):
        resolve_model(str(tmp_path / "tiny.gguf"))
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_gguf_file_with_scaled_positions_is_refused(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    write_gguf(tiny_checkpoint("llama"), tmp_path / "tiny.gguf", scaling=4.0)
    with pytest.raises(UserError, match=r"scales its rotary positions \(linear\)"):
        resolve_model(str(tmp_path / "tiny.gguf"))


def test_a_folder_of_gguf_files_names_one(tmp_path: Path) -> None:
    (tmp_path / "tiny.Q4_0.gguf").touch()
    with pytest.raises(UserError, match=r"name one of its GGUF files, such as .*tiny\.Q4_0\.gguf"):
        resolve_model(str(tmp_path))
    with pytest.raises(UserError, match=r"tiny\.Q4_0\.gguf cannot be read as a model"):
        resolve_model(str(tmp_path / "tiny.Q4_0.gguf"))


def test_compressing_a_gguf_file_compresses_its_model(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    source = tiny_checkpoint("llama")
    shutil.copy(source / "tokenizer.json", tmp_path)
    shutil.copy(source / "tokenizer_config.json", tmp_path)
    write_gguf(source, tmp_path / "tiny.gguf")
    (tmp_path / "text.txt").write_text("Of counting words there is no end. " * 40, encoding="utf-8")
    plan = "{format: 1, keep: 0.5, calibration: {samples: 4, seq_len: 32}}"
    for model, out in ((source, "plain"), (tmp_path / "tiny.gguf", "converted")):
        words = ["compress", model, "--plan", plan, "--calib", tmp_path / "text.txt", "--out", tmp_path / out]
        result = CliRunner().invoke(app, [str(word) for word in (*words, "--no-eval")])
        assert result.exit_code == 0, result.output
        assert ("is a GGUF file; its weights were read as float32" in result.output) == (out == "converted")
    plain, converted = tensors(tmp_path / "plain"), tensors(tmp_path / "converted")
    assert all(torch.equal(plain[name], converted[name]) for name in plain)
    manifest = json.loads((tmp_path / "converted" / "lrc.json").read_text(encoding="utf-8"))
    assert manifest["model"]["source"] == str(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("options", [{}, {"use_dora": True, "modules_to_save": ["lm_head"]}])
def test_an_adapter_is_merged_into_its_base(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], options: dict[str, Any]
) -> None:
    base = tiny_checkpoint("llama")
    model = write_adapter(base, tmp_path / "adapter", lora(**options)).eval()
    found = resolve_model(str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = model(IDS).logits
        made = lrc.load(tmp_path / "adapter")(IDS).logits
        assert (expected - lrc.load(base)(IDS).logits).abs().max() > 0.1
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert f"merged into {base}" in str(found.note)
    assert (found.path / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def without_first(adapter: Path) -> None:
    kept = dict(list(load_file(adapter / "adapter_model.safetensors").items())[1:])
    save_file(kept, adapter / "adapter_model.safetensors")


def with_another(adapter: Path) -> None:
    held = load_file(adapter / "adapter_model.safetensors")
    deeper = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    save_file({**held, deeper: torch.ones(4, 32)}, adapter / "adapter_model.safetensors")


def rename_base(name: str | None) -> Callable[[Path], None]:
    return lambda adapter: change(adapter / "adapter_config.json", base_model_name_or_path=name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_first, r"is an adapter for another model: .* also takes .*layers\.0.*lora_A"),
        (with_another, r"is an adapter for another model: .* has no place for .*layers\.7"),
        (rename_base("tiny-gpt2"), "cannot be read as a model: .*not found in the base model"),
        (rename_base("tiny-llama"), "cannot be read as a model: .*size mismatch"),
        (rename_base("./nowhere"), r"its base cannot be had: there is no folder \./nowhere"),
        (rename_base(None), "names no base"),
        (rename_base("~nobody_here/x"), "its base cannot be had: there is no folder ~nobody_here/x"),
        (lambda folder: rename_base(str(folder))(folder), "which is an adapter too"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{"),
            r"adapter_config\.json is not JSON",
        ),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "--allow-pickle"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"cut"),
            "cannot be read as a model",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    adapter: Path, cache: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(adapter)
    with pytest.raises(UserError, match=message):
        resolve_model(str(adapter))
    assert not cache.exists() or not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_matrices_is_refused(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], target: str
) -> None:
    config = peft.LoraConfig(r=4, target_modules=[target], init_lora_weights=False, task_type="CAUSAL_LM")
    write_adapter(tiny_checkpoint("llama", tie_word_embeddings=True), tmp_path / "tied", config)
    with pytest.raises(UserError, match="which its base ties to one tensor"):
        resolve_model(str(tmp_path / "tied"))
    write_adapter(tiny_checkpoint("llama"), tmp_path / "untied", config)
    assert resolve_model(str(tmp_path / "untied")).note


def test_an_adapter_beside_a_model_is_refused(adapter: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    shutil.copy(tiny_checkpoint("gpt2") / "config.json", adapter)
    assert resolve_model(str(adapter)).note  # training tools write the base's config there
    shutil.copy(tiny_checkpoint("gpt2") / "model.safetensors", adapter)
    with pytest.raises(UserError, match=r"holds a model \(model\.safetensors\) and a PEFT adapter"):
        resolve_model(str(adapter))


def test_a_pickled_base_needs_permission(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    base = tiny_checkpoint("llama")
    write_adapter(base, tmp_path / "adapter", lora())
    torch.save(tensors(base), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        resolve_model(str(tmp_path / "adapter"))
    assert resolve_model(str(tmp_path / "adapter"), allow_pickle=True).note


def test_an_adapter_without_weights_to_merge_is_refused(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    write_adapter(tiny_checkpoint("llama"), tmp_path / "prefix", prefix)
    with pytest.raises(
        UserError, match="PREFIX_TUNING adapter, which has no weights to merge; name its base"
    ):
        resolve_model(str(tmp_path / "prefix"))


def test_blocks_of_fp8_are_dequantized(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    meant = write_fp8(tiny_checkpoint("llama"), tmp_path / "fp8", 16, 16)
    found, reader = open_checkpoint(tmp_path / "fp8", lrc.Run())
    made = tensors(found.path)
    assert made.keys() == meant.keys()
    assert all(torch.equal(made[name], meant[name]) for name in meant)
    assert "is quantized (fp8); its weights were dequantized" in reader.warnings[0]
    assert resolve_model(str(tmp_path / "fp8")).path == tmp_path / "fp8"


def test_blocks_that_do_not_fill_a_matrix_are_refused(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    write_fp8(tiny_checkpoint("llama"), tmp_path / "fp8", 16, 16)
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [20, 20]}
    change(tmp_path / "fp8" / "config.json", quantization_config=method)
    with pytest.raises(UserError, match="in blocks of 20 x 20"):
        dequantized(resolve_model(str(tmp_path / "fp8")))
    del method["weight_block_size"]  # transformers then takes 128 x 128
    change(tmp_path / "fp8" / "config.json", quantization_config=method)
    with pytest.raises(
        UserError, match=r"in blocks of 128 x 128, which do not fill .* would read other weights"
    ):
        dequantized(resolve_model(str(tmp_path / "fp8")))


@pytest.mark.parametrize("method", ["gptq", "awq", "of-tomorrow"])
def test_a_format_that_transformers_cannot_turn_back_is_named(
    tiny_checkpoint: Callable[..., Path], method: str
) -> None:
    folder = tiny_checkpoint("llama")
    change(folder / "config.json", quantization_config={"quant_method": method, "bits": 4, "group_size": 128})
    with pytest.raises(UserError, match=rf"is quantized \({method}\), which transformers cannot turn back"):
        dequantized(resolve_model(str(folder)))


def test_what_a_killed_process_left_is_replaced(
    adapter: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = resolve_model(str(adapter)).path
    shutil.move(made, cache / f".{made.name}")
    (cache / f".{made.name}" / "model.safetensors").write_bytes(b"cut")
    assert resolve_model(str(adapter)).path == made
    assert tensors(made)
    assert not (cache / f".{made.name}").exists()
    monkeypatch.setattr(conversion, "_load", None)  # nothing is made again
    assert resolve_model(str(adapter)).path == made


@pytest.mark.parametrize("full", [False, True])
def test_a_cache_that_cannot_hold_the_model_is_named(
    adapter: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    def fails(*names: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    if full:
        monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fails)
    else:
        cache.parent.touch()  # a file where the folder should be
    with pytest.raises(
        UserError, match=r"cannot hold the converted model .*; set HF_HOME to a folder that can"
    ):
        resolve_model(str(adapter))
    assert not full or not [path for path in cache.iterdir() if path.is_dir()]
