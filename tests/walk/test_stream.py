from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.checkpoint.reader import CheckpointReader
from lrc.errors import UserError
from lrc.families import families
from lrc.walk.stream import Batch, ModelStream

CPU = torch.device("cpu")
FAMILIES = sorted(families())


def blocks(count: int = 5, tokens: int = 24) -> Tensor:
    return torch.randint(0, 256, (count, tokens), generator=torch.Generator().manual_seed(0))


def open_stream(folder: Path, dtype: torch.dtype = torch.float32) -> ModelStream:
    return ModelStream(CheckpointReader(folder), CPU, dtype)


def walk(stream: ModelStream, batches: list[Batch]) -> list[Tensor]:
    """Hidden states of all blocks before the first layer and after every one."""
    states = [torch.cat([batch.hidden for batch in batches])]
    for index in range(len(stream.skeletons)):
        layer, _ = stream.layer(index)
        for batch in batches:
            batch.hidden = stream.run(layer, index, batch, batch.hidden)
        states.append(torch.cat([batch.hidden for batch in batches]))
    return states


@torch.no_grad()
def stock_states(folder: Path, ids: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same by transformers; its last ones have gone through the final norm."""
    # By name, as transformers before 5.21 runs gemma2 in sdpa, without its soft caps.
    attention = "sdpa" if CheckpointReader(folder).family.sdpa else "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
    return [h.float() for h in model(ids, output_hidden_states=True).hidden_states]


@torch.no_grad()
def normed(folder: Path, hidden: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.get_submodule(CheckpointReader(folder).family.final_norm)(hidden)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_hidden_states_are_those_of_transformers(tiny_checkpoint, family, batch_size):
    """Batches of two leave a last one of a single block."""
    folder, ids = tiny_checkpoint(family, num_hidden_layers=3), blocks()
    stream = open_stream(folder)
    states, expected = walk(stream, stream.embed(ids.split(batch_size))), stock_states(folder, ids)
    assert len(states) == len(expected) == 4
    for ours, theirs in zip(states[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normed(folder, states[-1]), expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_sees_a_later_one(tiny_checkpoint, family):
    folder, ids = tiny_checkpoint(family), blocks(2)
    changed = ids.clone()
    changed[:, 15:] = 7
    stream = open_stream(folder)
    one, other = (walk(stream, stream.embed(x.split(2)))[-1] for x in (ids, changed))
    torch.testing.assert_close(one[:, :15], other[:, :15], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(one[:, 15:], other[:, 15:], atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_layers_stay_close_on_a_float32_stream(tiny_checkpoint, family):
    folder, ids = tiny_checkpoint(family), blocks()
    # Random norms that multiply by 1 + w amplify rounding.
    near = 0.03 if family in ("gemma", "gemma2") else 0.02
    stream = open_stream(folder, torch.bfloat16)
    batches = stream.embed(ids.split(2))
    assert all(batch.hidden.dtype == torch.float32 for batch in batches)
    states, exact = walk(stream, batches), stock_states(folder, ids)
    stock = stock_states(folder, ids, torch.bfloat16)
    for ours, theirs, right in zip(states[:-1], stock[:-1], exact[:-1], strict=True):
        assert ours.dtype == torch.float32
        size = right.norm()
        assert (ours - right).norm() < near * size
        assert (ours - right).norm() < 1.5 * (theirs - right).norm()  # no worse than transformers' own
    final = normed(folder, states[-1])
    assert (final - exact[-1]).norm() < near * exact[-1].norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_brings_its_tensors_in_the_checkpoints_precision(tiny_checkpoint, family):
    stream = open_stream(tiny_checkpoint(family), torch.bfloat16)
    layer, state = stream.layer(1)
    assert set(state) == set(layer.state_dict())
    for name, tensor in stream.reader.layer(1).items():
        assert torch.equal(state[name], tensor)
        held = layer.state_dict()[name]
        assert held.dtype == (torch.bfloat16 if tensor.ndim > 1 else torch.float32)
    assert not any(p.requires_grad for p in layer.parameters())
    assert all(p.is_meta for p in stream.skeletons[1].parameters())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_no_number_stops_the_walk(tiny_checkpoint, value):
    folder = tiny_checkpoint("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stream = open_stream(folder)
    stream.layer(0)
    with pytest.raises(UserError, match=r"layer 1: mlp.up_proj.weight has NaN or inf"):
        stream.layer(1)


def test_a_missing_embedding_is_named(tiny_checkpoint):
    folder = tiny_checkpoint("llama", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no tensor 'model.embed_tokens.weight'"):
        open_stream(folder).embed([blocks()])


@pytest.mark.parametrize(
    ("calls", "reads"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3]),
        ([3, 2, 1, 0], [3, 2, 1, 0]),
        ([0, 1, 2, 3, 3, 2], [0, 1, 2, 3, 3, 2, 1]),
        ([2, 0], [2, 3, 0, 1]),
    ],
)
def test_the_next_layer_is_read_ahead_and_none_twice(tiny_checkpoint, monkeypatch, calls, reads):
    stream = open_stream(tiny_checkpoint("llama", num_hidden_layers=4))
    seen, read = [], stream.reader.layer

    def noted(index: int) -> dict[str, Tensor]:
        seen.append((index, threading.current_thread() is threading.main_thread()))
        return read(index)

    monkeypatch.setattr(stream.reader, "layer", noted)
    for index in calls:
        module, state = stream.layer(index)
        expected = read(index)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        assert torch.equal(module.get_parameter("mlp.up_proj.weight"), expected["mlp.up_proj.weight"])
        if stream._ahead:
            stream._ahead[1].result()
    # The first of a way is waited for; 3 then 2 had 3 + 1 ahead, which is no layer.
    assert sorted(index for index, _ in seen) == sorted(reads)
    assert any(not waited for _, waited in seen)


def test_a_damaged_layer_is_told_when_its_turn_comes(tiny_checkpoint):
    folder = tiny_checkpoint("llama", num_hidden_layers=3)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stream = open_stream(folder)
    stream.layer(0)
    with pytest.raises(UserError, match=r"layer 1: mlp\.up_proj\.weight has NaN or inf"):
        stream.layer(1)
