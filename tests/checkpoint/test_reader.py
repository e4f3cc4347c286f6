from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.checkpoint.reader import CheckpointReader
from lrc.errors import UserError
from lrc.families import canonical

FAMILIES = ["gpt2", "llama"]


def state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shard(folder: Path, count: int) -> None:
    """Deal the tensors of a checkpoint out to several files with an index."""
    tensors, weight_map = state(folder), {}
    (folder / "model.safetensors").unlink()
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {n: tensors[n] for n in sorted(tensors)[i::count]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def everything(reader: CheckpointReader) -> dict[str, Tensor]:
    found = reader.rest()
    for index in range(reader.architecture.layers):
        found |= {f"{reader.family.layers}.{index}.{n}": t for n, t in reader.layer(index).items()}
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_rest_and_layers_are_all_of_it_once(tiny_checkpoint, family):
    folder = tiny_checkpoint(family, num_hidden_layers=11)  # layer 1 is not layer 10
    reader = CheckpointReader(folder)
    assert_same(everything(reader), state(folder))
    assert not any(".10." in name for name in reader.layer(1))
    assert reader.architecture.total_parameters == sum(t.numel() for t in state(folder).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_hold_the_same_checkpoint(tiny_checkpoint, family):
    folder = tiny_checkpoint(family)
    expected = state(folder)
    shard(folder, 3)
    assert_same(everything(CheckpointReader(folder)), expected)


def test_a_shard_that_is_not_there_is_named(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    shard(folder, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"missing files: model-00002-of-00003\.safetensors"):
        CheckpointReader(folder)


def test_old_gpt2_names_have_no_prefix_and_buffers_nobody_reads(tiny_checkpoint):
    folder = tiny_checkpoint("gpt2")
    expected = state(folder)
    hub = {name.removeprefix("transformer."): tensor for name, tensor in expected.items()}
    for index in range(2):
        hub[f"h.{index}.attn.bias"] = torch.ones(64, 64).tril()[None, None]
        hub[f"h.{index}.attn.masked_bias"] = torch.tensor(-1e4)
    rewrite(folder, hub)
    reader = CheckpointReader(folder)
    assert_same(everything(reader), expected)
    assert "attn.c_attn.bias" in reader.layer(0)


def test_old_llama_buffers_are_left_out(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    expected = state(folder)
    rewrite(folder, {**expected, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert_same(everything(CheckpointReader(folder)), expected)


def test_a_tied_head_held_a_second_time_is_read_once(tiny_checkpoint):
    folder = tiny_checkpoint("llama", tie_word_embeddings=True)
    expected = state(folder)
    assert "lm_head.weight" not in expected
    rewrite(folder, {**expected, "lm_head.weight": expected["model.embed_tokens.weight"].clone()})
    reader = CheckpointReader(folder)
    assert_same(everything(reader), expected)
    assert reader.architecture.total_parameters == sum(t.numel() for t in expected.values())


def test_an_untied_head_is_kept(tiny_checkpoint):
    folder = tiny_checkpoint("llama", tie_word_embeddings=False)
    assert torch.equal(CheckpointReader(folder).rest()["lm_head.weight"], state(folder)["lm_head.weight"])


@pytest.mark.parametrize("sharded", [False, True])
def test_pickles_are_read_only_on_demand(tiny_checkpoint, sharded):
    folder = tiny_checkpoint("gpt2")
    expected = state(folder)
    (folder / "model.safetensors").unlink()
    if sharded:
        names = sorted(expected)
        for i, part in enumerate((names[::2], names[1::2]), start=1):
            torch.save({n: expected[n] for n in part}, folder / f"pytorch_model-{i}.bin")
        weight_map = {n: f"pytorch_model-{1 + i % 2}.bin" for i, n in enumerate(names)}
        (folder / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    else:
        torch.save(expected, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="--allow-pickle"):
        CheckpointReader(folder)
    assert_same(everything(CheckpointReader(folder, allow_pickle=True)), expected)


def test_pickles_of_the_old_format_are_read_too(tiny_checkpoint):
    folder = tiny_checkpoint("gpt2")
    expected = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(expected, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(everything(CheckpointReader(folder, allow_pickle=True)), expected)


def test_a_pickle_that_would_run_code_is_refused(tiny_checkpoint, tmp_path):
    class Code:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    folder = tiny_checkpoint("gpt2")
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin cannot be read"):
        CheckpointReader(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"quantization_config": "int8"}, "int8"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0"),
        ({"num_hidden_layers": 3}, "says 3 layers.* hold 2"),
        ({"initializer_range": None}, "config.json .*initializer_range"),
        ({"num_attention_heads": 5}, "config.json .*hidden size"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"is compressed already \(gptq\)"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        (
            {
                "architectures": ["MineForCausalLM"],
                "auto_map": {"AutoModelForCausalLM": "mine.MineForCausalLM"},
            },
            "MineForCausalLM, which is Python code of its own; lrc compresses LlamaForCausalLM",
        ),
    ],
)
def test_what_is_no_supported_model_is_refused(tiny_checkpoint, damage, words):
    folder = tiny_checkpoint("llama")
    set_config(folder, **damage)
    with pytest.raises(UserError, match=words):
        CheckpointReader(folder)


def test_a_folder_without_config_or_weights_is_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"it has no config.json"):
        CheckpointReader(tmp_path / "empty")
    folder = tiny_checkpoint("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        CheckpointReader(folder)


@pytest.mark.parametrize("damaged", ["{", "[]"])
def test_a_damaged_generation_config_is_refused(tiny_checkpoint, damaged):
    """transformers loads no model beside a list, and takes other damage for no file, which would be copied."""
    folder = tiny_checkpoint("llama")
    (folder / "generation_config.json").write_text(damaged)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        CheckpointReader(folder)


@pytest.mark.parametrize("length", [4, 100, -10])
def test_a_file_cut_short_is_refused(tiny_checkpoint, length):
    folder = tiny_checkpoint("llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match=r"cut short|damaged"):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"shape":[256,32]', b'"shape":[256,34]'),
        (b'"shape":', b'"shapf":'),
        (b'"shape":[256,', b'"shape":[25s,'),
        (b'"data_offsets":[', b'"data_offsets":{'),
        (b'"dtype":"F32"', b'"dtype":"F16"'),
        (b'"dtype":"F32"', b'"dtype":"F31"'),
        (b"{", b"\xff"),
    ],
)
def test_a_header_that_was_damaged_is_refused(tiny_checkpoint, old, new):
    folder = tiny_checkpoint("llama")
    file = folder / "model.safetensors"
    assert old in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(old, new, 1))
    with pytest.raises(UserError, match=r"model.safetensors(?: is damaged|: tensor .* is stored as F31)"):
        CheckpointReader(folder)


def test_the_fingerprint_knows_the_config_and_the_shapes(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    first = CheckpointReader(folder).fingerprint
    assert CheckpointReader(folder).fingerprint == first
    set_config(folder, rms_norm_eps=0.5)
    second = CheckpointReader(folder).fingerprint
    rewrite(folder, {name: tensor.bfloat16() for name, tensor in state(folder).items()})
    assert len({first, second, CheckpointReader(folder).fingerprint}) == 3


def test_the_precision_is_that_of_most_weights(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    tensors = {n: t.bfloat16() if t.ndim > 1 else t for n, t in state(folder).items()}
    rewrite(folder, tensors)
    assert CheckpointReader(folder).dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_are_the_modules_own_maps(tiny_checkpoint, family):
    """Unfused and turned to (out, in), they give what transformers' modules give."""

    folder = tiny_checkpoint(family)
    reader = CheckpointReader(folder)
    layer = AutoModelForCausalLM.from_pretrained(folder).get_submodule(f"{reader.family.layers}.1")
    for role, matrix in reader.architecture.matrices.items():
        weight, bias = canonical(reader.family, reader.architecture, reader.layer(1), role)
        assert weight.shape == (matrix.rows, matrix.columns)
        x = torch.randn(3, matrix.columns)
        stored = reader.family.projections[role]
        whole = layer.get_submodule(stored.module)(x)
        start = (
            sum(reader.architecture.matrices[r].rows for r in stored.fused[: stored.fused.index(role)])
            if (stored.fused)
            else 0
        )
        expected = whole[:, start : start + matrix.rows]
        torch.testing.assert_close(torch.nn.functional.linear(x, weight, bias), expected)


def test_nothing_is_written_to_the_source(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("gpt2")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    everything(CheckpointReader(folder))
    for path in copy.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert len(list(copy.iterdir())) == len(list(folder.iterdir()))
