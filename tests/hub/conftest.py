"""Compressed checkpoints written by hand, each with the stock model that it must equal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import lrc  # noqa: F401
from lrc.families import Architecture, Stored, canonical, describe, family_of
from lrc.modules import kinds

Weights = dict[str, tuple[Tensor, Tensor | None]]
HEADS, WIDTH = 4, 8
KINDS = {
    "q": "low_rank",
    "v": "monarch",
    "o": "low_rank",
    "gate": "monarch",
    "fc_in": "monarch",
    "down": "low_rank",
}


@dataclass
class Layer:
    """One layer's projections as stored and those of the equal stock model, head widths and kinds."""

    stored: Weights
    equal: Weights
    qk: int = WIDTH
    v: int = WIDTH
    columns: Tensor | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Compressed:
    """A compressed checkpoint and the stock model that computes the same."""

    folder: Path
    source: Path
    stock: PreTrainedModel
    model_type: str


def reduce_attention(layer: Layer, architecture: Architecture, index: int) -> None:
    """Keep random dimensions (llama: rotary pairs of every key head) of qk, and a random subspace of v."""
    kv, group = architecture.kv_heads, HEADS // architecture.kv_heads
    rotary = architecture.family.rotary == "half"
    layer.qk, layer.v = (4, 5) if index % 2 else (6, 3)
    if "qk" in architecture.closed:
        layer.qk = WIDTH
        kept = torch.arange(WIDTH).expand(kv, WIDTH)
    elif rotary:
        first = torch.stack([torch.randperm(WIDTH // 2)[: layer.qk // 2] for _ in range(kv)])
        kept = torch.cat([first, first + WIDTH // 2], dim=1)
        layer.columns = kept
    else:
        kept = torch.stack([torch.randperm(WIDTH)[: layer.qk] for _ in range(kv)])
    for role, repeats in (("q", group), ("k", 1)):
        keep_rows(layer, role, kept.repeat_interleave(repeats, dim=0))
    basis = torch.linalg.qr(torch.randn(kv, WIDTH, layer.v))[0]
    weight, bias = layer.stored["v"]
    heads = weight.unflatten(0, (kv, WIDTH))
    small = basis.mT @ heads
    bias_small = None if bias is None else (basis.mT @ bias.view(kv, WIDTH, 1))
    back = None if bias_small is None else (basis @ bias_small).flatten()
    layer.equal["v"] = (basis @ small).flatten(0, 1), back
    layer.stored["v"] = small.flatten(0, 1), None if bias_small is None else bias_small.flatten()
    weight, bias = layer.stored["o"]
    per_head = weight.unflatten(1, (HEADS, WIDTH)).transpose(0, 1) @ basis.repeat_interleave(group, dim=0)
    layer.stored["o"] = per_head.transpose(0, 1).flatten(1), bias


def keep_rows(layer: Layer, role: str, kept: Tensor) -> None:
    """Keep some rows of every head, in the order given; the stock model has zeros in the other ones."""
    rows = (kept + torch.arange(len(kept))[:, None] * WIDTH).flatten()
    weight, bias = layer.stored[role]
    gone = torch.ones(len(weight), dtype=torch.bool)
    gone[rows] = False
    masked = None if bias is None else bias.masked_fill(gone, 0)
    layer.equal[role] = weight.masked_fill(gone[:, None], 0), masked
    layer.stored[role] = weight[rows], None if bias is None else bias[rows]


def reduce_mlp(layer: Layer, architecture: Architecture, index: int) -> None:
    """Keep some hidden neurons; in the stock model the others have zero rows, so that they give zero."""
    width = layer.stored[architecture.family.mlp_output][0].shape[1]
    kept = torch.randperm(width)[: width // 2 + index]
    gone = torch.ones(width, dtype=torch.bool)
    gone[kept] = False
    for role in architecture.family.mlp_inputs:
        weight, bias = layer.stored[role]
        masked = None if bias is None else bias.masked_fill(gone, 0)
        layer.equal[role] = weight.masked_fill(gone[:, None], 0), masked
        layer.stored[role] = weight[kept], None if bias is None else bias[kept]
    weight, bias = layer.stored[architecture.family.mlp_output]
    layer.stored[architecture.family.mlp_output] = weight[:, kept], bias


def factorize(layer: Layer, architecture: Architecture, index: int) -> None:
    """Store several projections as random factors of both kinds."""
    layer.kinds = {role: kind for role, kind in KINDS.items() if role in layer.stored}


def keep_all(layer: Layer, architecture: Architecture, index: int) -> None:
    """Store every projection as it is, apart."""


CHANGES: dict[str, tuple[Callable[[Layer, Architecture, int], None], ...]] = {
    "full": (keep_all,),
    "attention": (reduce_attention,),
    "mlp": (reduce_mlp,),
    "factors": (factorize,),
    "all": (reduce_attention, reduce_mlp, factorize),
}


def random_factors(kind: str, shape: tuple[int, int]) -> dict[str, Tensor]:
    rows, columns = shape
    if kind == "low_rank":
        return {"A": torch.randn(3, columns) * 0.2, "B": torch.randn(rows, 3) * 0.2}
    return {"L": torch.randn(2, rows // 2, 2 * 2) * 0.2, "R": torch.randn(2, 2 * 2, columns // 2) * 0.2}


def store(layer: Layer, path: Callable[[str], str], table: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Add a layer's projections to a table and a state dict under ``path(role)``."""
    for role, (weight, bias) in layer.stored.items():
        out, into = weight.shape
        entry: dict[str, Any] = {"kind": "dense", "in": into, "out": out, "bias": bias is not None}
        tensors = {"weight": weight} | ({} if bias is None else {"bias": bias})
        if role in layer.kinds:
            kind = kinds()[layer.kinds[role]]
            factors = random_factors(kind.kind, (out, into))
            entry = kind.entry(factors, bias is not None)
            module = kind.from_entry(entry)
            module.load_factors(factors, bias)
            tensors = dict(module.state_dict())
            expand(layer, role, kind.dense(factors), bias)
        table[path(role)] = entry
        state |= {f"{path(role)}.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def expand(layer: Layer, role: str, weight: Tensor, bias: Tensor | None) -> None:
    """Make the stock model hold the matrix that stands for factors."""
    whole = layer.equal[role][0].new_zeros(layer.equal[role][0].shape)
    assert weight.shape == whole.shape, "a factorized projection that was also cut has no stock form here"
    layer.equal[role] = weight, bias


def put_back(stock: PreTrainedModel, architecture: Architecture, index: int, equal: Weights) -> None:
    """Set a stock layer's projections from unfused (out, in) weights."""
    family = architecture.family
    decoder = stock.get_submodule(f"{family.layers}.{index}")
    done = set()
    for role, stored in family.projections.items():
        if stored.module in done:
            continue
        done.add(stored.module)
        parts = [equal[r] for r in stored.fused or (role,)]
        weight = joined(architecture, stored, [w for w, _ in parts])
        module: Any = decoder.get_submodule(stored.module)
        with torch.no_grad():
            module.weight.copy_(weight.T if stored.input_major else weight)
            if parts[0][1] is not None:
                module.bias.copy_(joined(architecture, stored, [b for _, b in parts if b is not None]))


def joined(architecture: Architecture, stored: Stored, parts: list[Tensor]) -> Tensor:
    """Put projections together as their module stores them."""
    if stored.order == "stacked":
        return torch.cat(parts)
    return torch.cat([part.unflatten(0, (architecture.heads, -1)) for part in parts], dim=1).flatten(0, 1)


def write(source: Path, folder: Path, change: str, *, shards: int = 1) -> Compressed:
    """Write a compressed form of a checkpoint and build its equal."""
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(source)
    family = family_of(config.model_type)
    old = load_file(source / "model.safetensors")
    stock = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    full = {n: t for n, t in stock.state_dict().items() if n in {family.own_name(each) for each in old}}
    architecture = describe(family, config, {name: tuple(t.shape) for name, t in full.items()})
    table: dict[str, Any] = {}
    state = {name: tensor for name, tensor in full.items() if not name.startswith(f"{family.layers}.")}
    for index in range(architecture.layers):
        start = f"{family.layers}.{index}."
        held = {n.removeprefix(start): t for n, t in full.items() if n.startswith(start)}
        roles = {role: canonical(family, architecture, held, role) for role in family.projections}
        layer = Layer(dict(roles), dict(roles))
        for apply in CHANGES[change]:
            apply(layer, architecture, index)
        if change == "all":  # only whole projections have a factorized equal
            whole = {r for r in roles if layer.stored[r][0].shape == roles[r][0].shape}
            layer.kinds = {role: kind for role, kind in layer.kinds.items() if role in whole}
        touched = {"mlp": (*family.mlp_inputs, family.mlp_output)}.get(change, tuple(roles))
        layer.stored = {role: layer.stored[role] for role in touched}
        replaced = tuple(f"{family.projections[role].module}." for role in touched)
        state |= {start + n: t for n, t in held.items() if not n.startswith(replaced)}
        if "q" in touched:
            attention = start + family.attention
            table[attention] = {
                "kind": "attention",
                "qk": layer.qk,
                "v": layer.v,
                "rotary_columns": layer.columns is not None,
            }
            if layer.columns is not None:
                state[f"{attention}.rotary_columns"] = layer.columns
        if family.split_mlp and family.mlp_output in touched:
            table[start + family.mlp] = {"kind": "mlp"}
        apart = {role: start + family.path(role, family.splits) for role in touched}
        gone = {start + family.projections[role].module for role in touched} - set(apart.values())
        state |= {f"{name}.weight": torch.empty(0) for name in gone}
        store(layer, apart.__getitem__, table, state)
        put_back(stock, architecture, index, layer.equal)
    folder.mkdir()
    raw = json.loads((source / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "lrc", "format_version": 1, "modules": table}
    (folder / "config.json").write_text(json.dumps(raw))
    save(state, folder, shards)
    return Compressed(folder, source, stock.eval(), config.model_type)


def save(state: dict[str, Tensor], folder: Path, shards: int) -> None:
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {n: state[n] for n in sorted(state)[shard::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def compressed(tiny_checkpoint: Any, tmp_path: Path) -> Callable[..., Compressed]:
    """Writes a checkpoint of a family compressed in one of the ways in CHANGES."""

    def make(family: str, change: str, *, shards: int = 1, **config: Any) -> Compressed:
        if family == "llama":
            config = {"attention_bias": True, "mlp_bias": True, **config}
        source = tiny_checkpoint(family, **config)
        return write(source, tmp_path / f"{family}-{change}-{shards}", change, shards=shards)

    return make
