"""The sweep against one backward pass through the whole model, and its figures against the model's own divergence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.checkpoint.reader import CheckpointReader
from lrc.errors import UserError
from lrc.families import canonical, families
from lrc.moments.gradient import GradientMoment, GradientTargets
from lrc.moments.observe import observe
from lrc.text.blocks import gradient_blocks, seed_for
from lrc.walk.backward import GradientSweep, states_held, stride
from lrc.walk.stream import ModelStream

CPU, SEED = torch.device("cpu"), 3
LAYERS = {"num_hidden_layers": 5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, grouped heads": ("llama", {}),
    "llama, biased": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "gpt2": ("gpt2", {}),
}


def blocks(count: int = 5, tokens: int = 24) -> Tensor:
    return torch.randint(1, 256, (count, tokens), generator=torch.Generator().manual_seed(0))


def everything(folder: Path) -> dict[int, GradientTargets]:
    architecture = CheckpointReader(folder).architecture
    return dict.fromkeys(range(architecture.layers), GradientTargets(frozenset(architecture.matrices), True))


def sweep(
    folder: Path, *, dtype: torch.dtype = torch.float32, batch: int = 2, seed: int = SEED, **more: Any
) -> dict[int, GradientMoment]:
    stream = ModelStream(CheckpointReader(folder), CPU, dtype)
    wanted = more.pop("wanted", None) or everything(folder)
    return GradientSweep(stream, more.pop("ids", blocks()), batch, **more).run(wanted, seed)


def tensors(found: dict[int, GradientMoment]) -> dict[str, Tensor]:
    named = {f"{i} {role}": g for i, moment in found.items() for role, g in moment.outputs.items()}
    return named | {f"{i} queries": m.queries for i, m in found.items() if m.queries is not None}


def whole_model(folder: Path, ids: Tensor) -> dict[str, Tensor]:
    """The same figures from one backward pass through the stock model for every block."""
    reader = CheckpointReader(folder)
    architecture, family = reader.architecture, reader.architecture.family
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    paths = {
        f"{i} {role}": f"{family.layers}.{i}.{stored.module}"
        for i in range(architecture.layers)
        for role, stored in family.projections.items()
    }
    heads, sums = architecture.geometry, {}
    for number, block in enumerate(ids):
        with observe(model, paths) as calls:
            logits = model(block[None]).logits[0]
        generator = torch.Generator().manual_seed(seed_for(SEED, f"gradients/{number}"))
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        outputs = [calls[name].output for name in paths]
        slopes = torch.autograd.grad(loss, outputs)
        for name, output, slope in zip(paths, outputs, slopes, strict=True):
            role = name.split()[1]
            fused = family.projections[role].fused
            sizes = [architecture.matrices[r].rows for r in fused] or [output.shape[-1]]
            part = fused.index(role) if fused else 0
            g, y = (x[0].split(sizes, dim=-1)[part].double() for x in (slope, output.detach()))
            sums[name] = sums.get(name, 0) + g.T @ g
            if role == "q":
                g, y = (x.reshape(len(block), heads.kv_heads, heads.group, heads.head_dim) for x in (g, y))
                if heads.rotary == "none":
                    total = torch.einsum("tkhi,tkhj->kij", g, g)
                else:
                    shares = (g * y).reshape(*g.shape[:-1], 2, -1).sum(dim=(2, 3))
                    total = torch.einsum("tki,tkj->kij", shares, shares)
                name = name.replace("q", "queries")
                sums[name] = sums.get(name, 0) + total
    return {name: total / ids.numel() for name, total in sums.items()}


@pytest.mark.parametrize("model", MODELS)
def test_moments_are_those_of_a_backward_pass_through_the_whole_model(tiny_checkpoint, model):
    family, config = MODELS[model]
    folder = tiny_checkpoint(family, **config)
    found, expected = sweep(folder), whole_model(folder, blocks())
    assert {moment.tokens for moment in found.values()} == {blocks().numel()}
    ours = tensors(found)
    assert set(ours) == set(expected)
    for name, right in expected.items():
        assert right.abs().max() > 0
        torch.testing.assert_close(
            ours[name].double(), right, rtol=1e-3, atol=1e-4 * float(right.abs().max())
        )


@pytest.mark.parametrize("family", sorted(families()))
def test_inputs_computed_again_are_those_that_were_kept(tiny_checkpoint, family):
    folder = tiny_checkpoint(family, **LAYERS)
    kept = tensors(sweep(folder, every=1))
    for every in (2, 3, 5):
        for name, tensor in tensors(sweep(folder, every=every)).items():
            assert torch.equal(tensor, kept[name]), (every, name)


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_labels(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    one, same, other = (tensors(sweep(folder, seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert not any(torch.allclose(tensor, other[name], rtol=1e-3) for name, tensor in one.items())


def test_the_batch_size_and_what_else_is_wanted_change_only_rounding(tiny_checkpoint):
    folder = tiny_checkpoint("llama", **LAYERS)
    all_of_it = tensors(sweep(folder))
    wanted = {2: GradientTargets(frozenset({"o"})), 4: GradientTargets(queries=True)}
    part = tensors(sweep(folder, wanted=wanted, batch=5, every=2))
    assert set(part) == {"2 o", "4 queries"}
    for name, tensor in part.items():
        torch.testing.assert_close(tensor, all_of_it[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_half_precision_stays_close(tiny_checkpoint, family, dtype):
    """A label may fall otherwise where its draw is close."""
    folder = tiny_checkpoint(family)
    exact, rough = tensors(sweep(folder)), tensors(sweep(folder, dtype=dtype))
    for name, right in exact.items():
        assert rough[name].dtype == torch.float32
        assert (rough[name] - right).norm() < 0.2 * right.norm(), name


def scale(folder: Path, factors: dict[str, float]) -> None:
    """Multiply the weights whose names hold a key."""
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        tensors[name] *= next((factor for part, factor in factors.items() if part in name), 1.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_float16_loses_no_small_gradients(tiny_checkpoint):
    """Gradients a hundred thousandth of their size are below what float16 holds."""
    folder = tiny_checkpoint("llama", tie_word_embeddings=False)
    scale(folder, {"lm_head": 2.0**-17})
    exact, rough = tensors(sweep(folder)), tensors(sweep(folder, dtype=torch.float16))
    for name, right in exact.items():
        assert (rough[name] - right).norm() < 0.2 * right.norm(), name


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_half_the_trace_is_the_divergence_that_a_change_causes(tiny_checkpoint, family):
    """At the last projection no token's change reaches another's logits; inputs and gradients are not independent."""
    folder, ids = tiny_checkpoint(family), blocks(40, 48)
    reader, index = CheckpointReader(folder), 1
    role = reader.architecture.family.mlp_output
    g = (
        sweep(folder, ids=ids, batch=8, wanted={index: GradientTargets(frozenset({role}))})[index]
        .outputs[role]
        .double()
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double().eval()
    stored = reader.architecture.family.projections[role]
    layer = model.get_submodule(f"{reader.architecture.family.layers}.{index}")
    with torch.no_grad(), observe(layer, {"x": stored.module}) as calls:
        old = model(ids).logits.log_softmax(-1)
    x = calls["x"].input.flatten(0, 1)
    c = x.T @ x / len(x)
    weight, _ = canonical(reader.architecture.family, reader.architecture, layer.state_dict(), role)
    generator, predicted, measured = torch.Generator().manual_seed(1), 0.0, 0.0
    for _ in range(4):
        change = 3e-3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        predicted += float(((g @ change @ c) * change).sum()) / 2
        with torch.no_grad():
            weight += change  # a view of the layer's own
            new = model(ids).logits.log_softmax(-1)
            weight -= change
        measured += float((old.exp() * (old - new)).sum(-1).mean())
    assert predicted == pytest.approx(measured, rel=0.3)


def test_logits_that_are_no_numbers_are_refused(tiny_checkpoint):
    folder = tiny_checkpoint("llama", tie_word_embeddings=False)
    scale(folder, {"lm_head": 1e38})
    with pytest.raises(UserError, match="logits are NaN or inf"):
        sweep(folder)


def test_gradients_that_overflow_are_refused(tiny_checkpoint):
    """What goes forward through small weights and large ones comes back through the large ones first."""
    folder = tiny_checkpoint("llama")
    scale(folder, {"layers.1.mlp.up_proj": 2.0**-15, "layers.1.mlp.down_proj": 2.0**15})
    sweep(folder)
    with pytest.raises(UserError, match="layer 1: gradients of the loss are NaN or inf; try --dtype float32"):
        sweep(folder, dtype=torch.float16)


def test_few_states_are_held_where_all_would_be_too_many():
    assert stride(32, 2**28) == 1
    assert stride(32, 2**28 + 1) == 6
    assert states_held(32, 1) == 33
    assert states_held(32, 6) == 12


def test_gradient_blocks_are_the_first_of_a_draw():
    ids = blocks(20)
    few, more = (gradient_blocks(ids, n, 0)[:, 0].tolist() for n in (5, 9))
    assert len(few) == 5
    assert set(few) < set(more)
    assert more == [n for n in ids[:, 0].tolist() if n in more]  # text order
    assert few != gradient_blocks(ids, 5, 1)[:, 0].tolist()
    assert torch.equal(gradient_blocks(ids, 50, 0), ids)


@pytest.mark.parametrize("size", [0.0, 1e-25])
def test_a_loss_that_nothing_changes_has_gradients_of_nothing(tiny_checkpoint: Any, size: float) -> None:
    """The final norm leaves (nearly) nothing of the hidden states, so that no gradient goes back behind it."""
    folder: Path = tiny_checkpoint("llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(size)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = tensors(sweep(folder))
    assert found
    assert all(bool(each.isfinite().all()) and float(each.abs().max()) <= size for each in found.values())
