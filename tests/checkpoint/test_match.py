"""Which tensors of a checkpoint are the model: those that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.checkpoint.reader import CheckpointReader
from lrc.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shard(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as two shards with an index, beside what is there."""
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_as_transformers(folder: Path) -> CheckpointReader:
    """The tensors of the reader are the parameters of the model that transformers loads."""
    reader, model = CheckpointReader(folder), AutoModelForCausalLM.from_pretrained(folder)
    found = reader.rest()
    for index in range(reader.architecture.layers):
        found |= {f"{reader.family.layers}.{index}.{n}": t for n, t in reader.layer(index).items()}
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name].to(parameter.dtype), parameter.data), name
    assert reader.config.tie_word_embeddings == (model.lm_head.weight is model.get_input_embeddings().weight)
    return reader


def test_a_tied_head_with_other_values_is_kept_and_said(tiny_checkpoint):
    folder = tiny_checkpoint("llama", tie_word_embeddings=True)
    edit(folder, lambda t: t.update({HEAD: torch.randn_like(t[EMBEDDING])}))
    reader = assert_as_transformers(folder)
    assert not reader.config.tie_word_embeddings
    assert reader.raw_config["tie_word_embeddings"] is False
    assert not reader.architecture.tied
    [warning] = reader.warnings
    assert HEAD in warning
    assert "tie_word_embeddings" in warning


def test_a_tied_model_may_hold_its_head_alone_or_twice(tiny_checkpoint):
    folder = tiny_checkpoint("llama", tie_word_embeddings=True)
    edit(folder, lambda t: t.update({HEAD: t[EMBEDDING]}))
    assert assert_as_transformers(folder).architecture.tied
    edit(folder, lambda t: t.pop(EMBEDDING))
    reader = assert_as_transformers(folder)
    assert reader.architecture.tied
    assert not reader.warnings


@pytest.mark.parametrize("gone", [False, True])
def test_a_single_file_comes_before_an_index(tiny_checkpoint, gone):
    folder = tiny_checkpoint("llama")
    shard(folder, {name: torch.randn_like(t) for name, t in load_file(folder / WEIGHTS).items()})
    if gone:
        (folder / "model-0.safetensors").unlink()
        (folder / "model-1.safetensors").unlink()
    [warning] = assert_as_transformers(folder).warnings
    assert WEIGHTS in warning
    assert INDEX in warning


def test_the_file_that_the_config_names_comes_first(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    other = {name: torch.randn_like(t) for name, t in load_file(folder / WEIGHTS).items()}
    save_file(other, folder / "other.safetensors", {"format": "pt"})
    set_config(folder, transformers_weights="other.safetensors")
    reader = assert_as_transformers(folder)
    assert "transformers_weights" not in reader.raw_config
    for named in ("gone.safetensors", "other.bin", "../other.safetensors", 3):
        set_config(folder, transformers_weights=named)
        with pytest.raises(UserError, match=f"transformers_weights: '?{named}"):
            CheckpointReader(folder)


@pytest.mark.parametrize("prefix", ["", "model.model."])
def test_names_may_lack_the_prefix_or_have_it_twice(tiny_checkpoint, prefix):
    folder = tiny_checkpoint("llama", tie_word_embeddings=True)

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)

    edit(folder, rename)
    assert not assert_as_transformers(folder).warnings


def test_unused_tensors_are_left_out_and_named(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    edit(folder, lambda t: t.update({"extra.weight": torch.ones(3), "model.layers.2.mlp.x": torch.ones(3)}))
    [warning] = assert_as_transformers(folder).warnings
    assert "extra.weight, model.layers.2.mlp.x" in warning


def test_a_named_file_may_be_a_link_as_in_the_cache_of_the_hub(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("llama")
    (folder / WEIGHTS).rename(tmp_path / "blob")
    (folder / "named.safetensors").symlink_to(tmp_path / "blob")
    set_config(folder, transformers_weights="named.safetensors")
    assert_as_transformers(folder)


def test_a_reader_of_outputs_reads_originals_alike(tiny_checkpoint):
    """As streamed evaluation does, which takes both."""
    folder = tiny_checkpoint("llama", tie_word_embeddings=True)
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda t: t.update({HEAD: t[EMBEDDING], old: torch.ones(4)}))
    assert CheckpointReader(folder, quantized="lrc").tensors.keys() == CheckpointReader(folder).tensors.keys()


def test_ties_are_judged_in_the_precision_of_the_config(tiny_checkpoint):
    folder = tiny_checkpoint("llama", tie_word_embeddings=True)
    set_config(folder, dtype="bfloat16")
    edit(folder, lambda t: t.update({HEAD: t[EMBEDDING].bfloat16()}))
    reader, model = CheckpointReader(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert reader.architecture.tied
    assert not reader.warnings


def test_null_is_no_quantization(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    set_config(folder, quantization_config=None)
    assert_as_transformers(folder)


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda t: t.pop(name))


def put(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda t: t.update({name: tensor}))


def key(**values: Any) -> Callable[[Path], None]:
    return lambda folder: set_config(folder, **values)


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (drop(HEAD), [HEAD]),
        (drop(EMBEDDING), [EMBEDDING]),
        (drop(f"{UP}.weight"), [f"{UP}.weight"]),
        (drop("model.norm.weight"), ["model.norm.weight"]),
        (
            put(f"{UP}.weight", torch.ones(40, 32)),
            [f"{UP}.weight", "[40, 32]", "[48, 32]", "intermediate_size: 48"],
        ),
        (put(f"{UP}.weight", torch.ones(48)), [f"{UP}.weight", "[48]", "[48, 32]"]),
        (put(f"{UP}.weight", torch.ones(48, 32, dtype=torch.int8)), [f"{UP}.weight", "int8"]),
        (put(f"{UP}.bias", torch.ones(48)), [f"{UP}.bias", "mlp_bias: false"]),
        (key(vocab_size=260), [EMBEDDING, "[256, 32]", "[260, 32]", "vocab_size: 260"]),
        (key(hidden_size=64), [EMBEDDING, "[256, 32]", "[256, 64]", "hidden_size: 64"]),
        (key(num_key_value_heads=4), ["k_proj.weight", "[16, 32]", "[32, 32]", "num_key_value_heads: 4"]),
        (key(attention_bias=True), ["q_proj.bias", "attention_bias: true"]),
    ],
)
def test_files_that_do_not_fill_the_model_are_refused(tiny_checkpoint, damage, named):
    folder = tiny_checkpoint("llama", tie_word_embeddings=False)
    damage(folder)
    with pytest.raises(UserError) as raised:
        CheckpointReader(folder)
    for words in named:
        assert words in str(raised.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"[1]", "list"),
        (b"{", "line 1"),
        (b"\xff\xfe{", "UTF-8"),
        (b'{"weight_map": {"a": "model.safetensors"}}', "metadata"),
        (b'{"metadata": {}, "weight_map": ["model.safetensors"]}', "weight_map"),
        (b'{"metadata": {}, "weight_map": {}}', "weight_map"),
        (b'{"metadata": {}, "weight_map": {"a": "gone.safetensors"}}', "gone.safetensors"),
    ],
)
def test_an_index_of_another_kind_is_refused(tiny_checkpoint, text, named):
    folder = tiny_checkpoint("llama")
    (folder / WEIGHTS).rename(folder / "model-0.safetensors")
    (folder / INDEX).write_bytes(text)
    with pytest.raises(UserError, match=named) as raised:
        CheckpointReader(folder)
    assert INDEX in str(raised.value)
