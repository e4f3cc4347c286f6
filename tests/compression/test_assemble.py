from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrc.checkpoint.reader import CheckpointReader
from lrc.compression.assemble import ReducedLayer, assemble, restore, store
from lrc.families import canonical
from lrc.maths.linalg import best_pair
from lrc.methods.contract import Affine, Factors, Prediction, Solution
from lrc.walk.stream import ModelStream

CPU = torch.device("cpu")
NOTHING = Prediction(0.0, 1.0, "output")


class Layer:
    """Layer 1 of a tiny checkpoint, with ways to solve parts of it."""

    def __init__(self, folder: Path) -> None:
        self.reader = CheckpointReader(folder)
        self.stream = ModelStream(self.reader, CPU, torch.float32)
        self.stock, self.state = self.stream.layer(1)
        self.architecture = self.reader.architecture

    def affine(self, role: str) -> Affine:
        return Affine(*canonical(self.reader.family, self.architecture, self.state, role))

    def pair(self, role: str, rank: int) -> Solution:
        """A projection as a low-rank pair."""
        b, a, _ = best_pair(self.affine(role).weight, rank)
        return Solution({role: Factors("low_rank", {"A": a, "B": b}, self.affine(role).bias)}, NOTHING)

    def narrow_values(self, width: int) -> Solution:
        """The first ``width`` dimensions of every value head."""
        shape = self.architecture
        v, o = self.affine("v"), self.affine("o")
        rows = torch.arange(shape.kv_heads * shape.head_dim).unflatten(0, (shape.kv_heads, -1))[:, :width]
        columns = torch.arange(shape.heads * shape.head_dim).unflatten(0, (shape.heads, -1))[:, :width]
        bias = None if v.bias is None else v.bias[rows.flatten()]
        parts = {
            "v": Affine(v.weight[rows.flatten()], bias),
            "o": Affine(o.weight[:, columns.flatten()], o.bias),
        }
        return Solution(parts, NOTHING)

    def build(self, *solutions: Solution, plain: Iterable[str] = ()) -> ReducedLayer:
        skeleton = self.stream.skeletons[1]
        reduced = assemble(self.architecture, skeleton, self.state, solutions, plain)
        self.stream.filled(reduced.module, reduced.state)
        return reduced

    def run(self, module: torch.nn.Module) -> Tensor:
        ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
        (batch,) = self.stream.embed([ids])
        return self.stream.run(module, 1, batch, batch.hidden)

    def with_weights(self, **weights: Tensor) -> torch.nn.Module:
        """The stock layer with other unfused (out, in) weights by role."""
        state = {name: tensor.clone() for name, tensor in self.state.items()}
        for role, weight in weights.items():
            canonical(self.reader.family, self.architecture, state, role)[0].copy_(weight)
        return self.stream.materialize(1, state)


@pytest.fixture
def layer(tiny_checkpoint: Any, family: str) -> Layer:
    return Layer(tiny_checkpoint(family))


llama = pytest.mark.parametrize("family", ["llama"])
gpt2 = pytest.mark.parametrize("family", ["gpt2"])
both = pytest.mark.parametrize("family", ["gpt2", "llama"])


@both
def test_nothing_solved_is_the_stock_layer(layer):
    reduced = layer.build()
    assert (reduced.table, reduced.paths) == ({}, {})
    assert set(reduced.state) == set(layer.state)
    assert all(reduced.state[name] is tensor for name, tensor in layer.state.items())
    assert torch.equal(layer.run(reduced.module), layer.run(layer.stock))


@llama
def test_a_pair_of_the_same_shape_leaves_the_attention_as_it_is(layer):
    reduced = layer.build(layer.pair("q", 3))
    assert list(reduced.table) == ["self_attn.q_proj"]
    assert reduced.table["self_attn.q_proj"] == {
        "kind": "low_rank", "in": 32, "out": 32, "rank": 3, "bias": False,
    }  # fmt: skip
    assert reduced.paths == {"q": "self_attn.q_proj"}
    b, a = (reduced.state[f"self_attn.q_proj.{name}.weight"] for name in "BA")
    expected = layer.run(layer.with_weights(q=b @ a))
    torch.testing.assert_close(layer.run(reduced.module), expected, rtol=1e-4, atol=1e-4)


@gpt2
def test_a_pair_in_a_fused_matrix_splits_it_and_marks_its_place(layer):
    reduced = layer.build(layer.pair("k", 3))
    assert set(reduced.table) == {"attn", *(f"attn.{role}_proj" for role in "qkvo")}
    assert reduced.table["attn"] == {"kind": "attention", "qk": 8, "v": 8, "rotary_columns": False}
    assert reduced.state["attn.c_attn.weight"].shape == (0,)
    assert reduced.state["attn.c_proj.weight"].shape == (0,)
    assert "attn.c_attn.bias" not in reduced.state
    for role in "qvo":
        assert torch.equal(reduced.state[f"attn.{role}_proj.weight"], layer.affine(role).weight)
        assert torch.equal(reduced.state[f"attn.{role}_proj.bias"], layer.affine(role).bias)
    b, a = (reduced.state[f"attn.k_proj.{name}.weight"] for name in "BA")
    expected = layer.run(layer.with_weights(k=b @ a))
    torch.testing.assert_close(layer.run(reduced.module), expected, rtol=1e-4, atol=1e-4)


@both
@pytest.mark.parametrize("width", [5, 8])
def test_narrow_values_beside_a_pair_for_the_queries(layer, width):
    """Zeroed value dimensions in the stock layer are those cut from the reduced one."""
    reduced = layer.build(layer.narrow_values(width), layer.pair("q", 4))
    attention = layer.reader.family.attention
    if attention in reduced.table:
        assert reduced.table[attention] == {
            "kind": "attention", "qk": 8, "v": width, "rotary_columns": False,
        }  # fmt: skip
    else:
        assert (width, attention) == (8, "self_attn")
    b, a = (reduced.state[f"{reduced.paths['q']}.{name}.weight"] for name in "BA")
    output = layer.affine("o").weight.clone()
    output.unflatten(1, (-1, 8))[:, :, width:] = 0
    expected = layer.run(layer.with_weights(q=b @ a, o=output))
    torch.testing.assert_close(layer.run(reduced.module), expected, rtol=1e-4, atol=1e-4)


@llama
def test_kept_rotary_columns_are_stored_unless_they_are_all(layer):
    q, k = layer.affine("q").weight, layer.affine("k").weight
    for columns in ([[0, 3, 4, 7], [1, 2, 5, 6]], [list(range(8))] * 2):
        kept = torch.tensor(columns)
        rows_k = torch.cat([kept[h] + 8 * h for h in range(2)])
        rows_q = torch.cat([kept[h // 2] + 8 * h for h in range(4)])
        parts = {"q": Affine(q[rows_q]), "k": Affine(k[rows_k])}
        reduced = layer.build(Solution(parts, NOTHING, rotary_columns=kept))
        gone_q, gone_k = torch.ones(32, 1), torch.ones(16, 1)
        gone_q[rows_q], gone_k[rows_k] = 0, 0
        expected = layer.run(layer.with_weights(q=q * (1 - gone_q), k=k * (1 - gone_k)))
        torch.testing.assert_close(layer.run(reduced.module), expected, rtol=1e-4, atol=1e-4)
        if len(columns[0]) == 4:
            assert torch.equal(reduced.state["self_attn.rotary_columns"], kept)
            assert reduced.table["self_attn"]["rotary_columns"]
        else:
            assert not any("rotary" in name for name in reduced.state)
            assert "self_attn" not in reduced.table
            beside = layer.build(Solution(parts, NOTHING, rotary_columns=kept), layer.narrow_values(4))
            assert not beside.table["self_attn"]["rotary_columns"]
            assert not any("rotary" in name for name in beside.state)


@both
def test_plain_roles_become_ordinary_linears_unless_they_are_solved(layer):
    output = layer.reader.family.mlp_output
    reduced = layer.build(layer.pair(output, 4), plain=["o", output])
    assert reduced.table[reduced.paths["o"]]["kind"] == "dense"
    assert reduced.table[reduced.paths[output]]["kind"] == "low_rank"
    assert torch.equal(reduced.state[f"{reduced.paths['o']}.weight"], layer.affine("o").weight)
    assert isinstance(reduced.module.get_submodule(reduced.paths["o"]), torch.nn.Linear)
    b, a = (reduced.state[f"{reduced.paths[output]}.{name}.weight"] for name in "BA")
    expected = layer.run(layer.with_weights(**{output: b @ a}))
    torch.testing.assert_close(layer.run(reduced.module), expected, rtol=1e-4, atol=1e-4)


@both
def test_each_new_tensor_has_the_precision_of_what_it_replaces(layer):
    families, architecture = layer.reader.family, layer.architecture
    module = families.projections["o"].module
    state = layer.state | {f"{module}.weight": layer.state[f"{module}.weight"].bfloat16()}
    reduced = assemble(architecture, layer.stream.skeletons[1], state, [layer.pair("o", 4)])
    path = f"{reduced.paths['o']}."
    new = {name.removeprefix(path): t.dtype for name, t in reduced.state.items() if name.startswith(path)}
    assert new.pop("B.bias", torch.float32) == torch.float32
    assert new == dict.fromkeys(("weight", "A.weight", "B.weight"), torch.bfloat16)
    others = {t.dtype for name, t in reduced.state.items() if not name.startswith((path, f"{module}."))}
    assert others == {torch.float32}


@both
def test_skeleton_and_state_are_left_as_they_were(layer):
    before = {name: tensor.clone() for name, tensor in layer.state.items()}
    shapes = {n: t.shape for n, t in layer.stream.skeletons[1].state_dict().items()}
    layer.build(layer.narrow_values(3), layer.pair("q", 4))
    assert {n: t.shape for n, t in layer.stream.skeletons[1].state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in layer.stream.skeletons[1].state_dict().values())
    assert all(torch.equal(layer.state[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("biased", [False, True])
def test_what_is_stored_comes_back_as_it_was_rounded(biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, left, right = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 12), (20, 3), (4, 5, 8), (4, 8, 3))
    )
    bias = torch.randn(20, generator=generator, dtype=torch.float64) if biased else None
    for part in (
        Factors("low_rank", {"A": a, "B": b}, bias),
        Factors("monarch", {"L": left, "R": right}, bias),
        Affine(b @ a, bias),
    ):
        again = restore(*store(part, torch.float32))
        if isinstance(part, Affine):
            assert isinstance(again, Affine)
            assert torch.equal(again.weight, part.weight.float())
        else:
            assert isinstance(again, Factors)
            assert again.kind == part.kind
            assert again.tensors.keys() == part.tensors.keys()
            assert all(torch.equal(again.tensors[n], t.float()) for n, t in part.tensors.items())
        assert (again.bias is None) == (bias is None)
        if bias is not None and again.bias is not None:
            assert torch.equal(again.bias, bias.float())
