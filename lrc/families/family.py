"""Describe a model family as data: where each projection is stored in a decoder layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from lrc.errors import UserError
from lrc.families.refusals import check_supported

if TYPE_CHECKING:
    from torch import Tensor

Component = Literal["qk", "ov", "mlp"]
# "half" rotates dimension i with i + D/2, "interleaved" with i + 1.
Rotary = Literal["none", "half", "interleaved"]
ATTENTION_ROLES = ("q", "k", "v", "o")
_COMPONENTS: Mapping[str, tuple[Component, ...]] = {"attention": ("qk", "ov"), "mlp": ("mlp",)}


@dataclass(frozen=True)
class Stored:
    """Location of one projection in a decoder layer.

    ``module`` is the path inside the layer. ``fused`` lists the roles that share the module's output rows, in order.
    ``order``: ``stacked`` role after role, or ``by_head``, all roles of a head before the next head.
    ``input_major``: weights are (in, out), as in GPT-2's Conv1D.
    """

    module: str
    fused: tuple[str, ...] = ()
    order: Literal["stacked", "by_head"] = "stacked"
    input_major: bool = False


@dataclass(frozen=True)
class Half:
    """Attention or MLP of a decoder layer, with its norm.

    ``norm`` reads the residual stream, ``module`` reads the norm's output; all paths are inside the layer. ``reads``:
    the site whose activations each projection reads, by role. ``output``: the role of the last projection.
    ``post_norm``: a norm between the module's output and the residual stream, if any.
    """

    name: Literal["attention", "mlp"]
    module: str
    norm: str
    reads: Mapping[str, str]
    output: str
    post_norm: str | None = None

    @property
    def targets(self) -> set[str]:
        """Components and projections that a plan can shrink."""
        return {*_COMPONENTS[self.name], *self.reads}


@dataclass(frozen=True)
class Family:
    """Facts of one ``model_type``; module paths are those of its causal language model in transformers.

    ``rotary_share``, ``soft_caps``, ``window`` and ``experts`` name config keys, as their values differ by model.
    ``lrc.families.refusals`` lists the facts that lrc cannot handle.
    """

    model_type: str
    prefix: str  # of the base model; tensor names of older checkpoints lack it
    layers: str
    halves: tuple[Half, Half]
    projections: Mapping[str, Stored]
    final_norm: str
    embedding: str  # of tokens; also the head's weight in tied models
    rotary: Rotary
    tiny: Mapping[str, Any]  # config of a small model for the contract tests
    head: str = "lm_head"
    split: Mapping[str, str] = field(default_factory=lambda: {r: f"{r}_proj" for r in ATTENTION_ROLES})
    dropout: str = "attention_dropout"  # attribute of the attention module: rate on the attention weights
    output_dropout: str | None = None  # module of the attention, after its output projection
    activation: str = "act_fn"  # attribute of a gated MLP
    norm_epsilon: str | None = None  # attribute of a root-mean-square norm; None for others
    norm_offset: int = 0  # norms multiply by this plus their weight
    # Norm of queries and keys, over each head or over all heads together.
    qk_norm: Literal["head", "width"] | None = None
    parallel: bool = False  # attention and MLP read the same residual stream
    rotary_share: str | None = None  # fraction of a head's dimensions that are rotated; None: all
    soft_caps: tuple[str, ...] = ()  # soft caps of scores or logits
    window: str | None = None  # sliding window of attention, in tokens
    experts: str | None = None  # number of experts
    stale: tuple[str, ...] = ()  # suffixes of tensors in old checkpoints that no module reads
    # The value that lrc cannot handle, by config key.
    unsupported: Mapping[str, object] = field(default_factory=dict)

    def half(self, name: Literal["attention", "mlp"]) -> Half:
        """Return the attention or MLP half of a layer."""
        return next(half for half in self.halves if half.name == name)

    @property
    def attention(self) -> str:
        """Path of the attention module inside the layer."""
        return self.half("attention").module

    @property
    def mlp(self) -> str:
        """Path of the MLP inside the layer."""
        return self.half("mlp").module

    @property
    def mlp_inputs(self) -> tuple[str, ...]:
        """Roles of the projections that compute the MLP's hidden state."""
        return tuple(role for role in self.half("mlp").reads if role != self.mlp_output)

    @property
    def mlp_output(self) -> str:
        """Role of the MLP's output projection."""
        return self.half("mlp").output

    def component(self, name: Component) -> tuple[str, ...]:
        """Return the roles of a component, its output projection last."""
        groups = {"qk": ("q", "k"), "ov": ("v", "o"), "mlp": (*self.mlp_inputs, self.mlp_output)}
        return groups[name]

    def site(self, role: str) -> str:
        """Return the site whose activations a projection reads."""
        return next(half.reads[role] for half in self.halves if role in half.reads)

    @property
    def outer(self) -> dict[str, str]:
        """Module path of each projection outside the decoder layers, by role."""
        return {"embed": self.embedding, "lm_head": self.head}

    @property
    def sites(self) -> dict[str, str]:
        """Module whose input is recorded for each site: the first projection that reads the site."""
        found: dict[str, str] = {}
        for half in self.halves:
            for role, site in half.reads.items():
                found.setdefault(site, self.projections[role].module)
        return found

    def split_module(self, role: str) -> str:
        """Return a projection's path inside the layer when q, k, v and o are stored as separate modules."""
        return f"{self.attention}.{self.split[role]}" if role in self.split else self.projections[role].module


@dataclass(frozen=True)
class Matrix:
    """Shape of one projection in (out, in) orientation."""

    rows: int
    columns: int
    bias: bool

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns} {'with' if self.bias else 'without'} a bias"

    @property
    def parameters(self) -> int:
        """Number of weights, without the bias."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Heads:
    """Head geometry of an attention; ``rotary``: the rotary layout, if any."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary: Rotary = "none"

    @property
    def group(self) -> int:
        """Query heads per key and value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Target:
    """A component or projection that a plan can shrink.

    ``full``: the original size. ``step``: the smallest valid change of the size. ``unit``: weights per unit of size.
    """

    name: str
    matrices: Mapping[str, Matrix]
    full: int
    step: int
    unit: int

    @property
    def parameters(self) -> int:
        """Number of original weights, without biases."""
        return sum(matrix.parameters for matrix in self.matrices.values())


@dataclass(frozen=True)
class Architecture:
    """Shapes of one model, from its config and the headers of its weights.

    ``tables``: the embedding and, unless tied, the head; one row per token.
    """

    family: Family
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int
    matrices: Mapping[str, Matrix]
    tables: Mapping[str, Matrix]
    total_parameters: int

    @cached_property
    def targets(self) -> dict[str, Target]:
        """Components and projections of a layer, by name."""
        family, per_rank = self.family, (self.heads + self.kv_heads) * self.hidden
        width = self.matrices[family.mlp_output].columns
        inner = {
            "qk": (self.head_dim, 1 if family.rotary == "none" else 2, per_rank),
            "ov": (self.head_dim, 1, per_rank),
            "mlp": (width, 1, len(family.component("mlp")) * self.hidden),
        }
        found = {
            name: Target(name, {r: self.matrices[r] for r in family.component(name)}, *inner[name])
            for name in ("qk", "ov", "mlp")
        }
        return found | {role: _single(role, matrix) for role, matrix in self.matrices.items()}

    @cached_property
    def outer(self) -> dict[str, Target]:
        """Targets outside the layers, by name."""
        return {role: _single(role, table) for role, table in self.tables.items()}

    @property
    def tied(self) -> bool:
        """Whether the embedding and the head share one weight."""
        return "lm_head" not in self.tables

    @property
    def geometry(self) -> Heads:
        """Head geometry of a layer."""
        return Heads(self.heads, self.kv_heads, self.head_dim, self.family.rotary)

    def output_rows(self, role: str) -> slice:
        """Return the output rows of the storing module that belong to a projection."""
        fused = self.family.projections[role].fused
        start = sum(self.matrices[r].rows for r in fused[: fused.index(role)]) if fused else 0
        return slice(start, start + self.matrices[role].rows)

    def site_width(self, site: str) -> int:
        """Return the width of the activations at a site."""
        roles = (role for role in self.matrices if self.family.site(role) == site)
        return self.matrices[next(roles)].columns

    @property
    def layer_parameters(self) -> int:
        """Number of weights of one decoder layer's projections; ``keep`` is a fraction of it."""
        return sum(matrix.parameters for matrix in self.matrices.values())


def _single(role: str, matrix: Matrix) -> Target:
    return Target(role, {role: matrix}, min(matrix.rows, matrix.columns), 1, matrix.rows + matrix.columns)


def describe(family: Family, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """Return a model's architecture from its config and its tensor shapes, by name.

    Raises UserError if the model has unsupported features, lacks a tensor, or has layers of different shapes.
    """
    check_supported(family, config)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    per_layer = [_layer_matrices(family, shapes, i, rows) for i in range(config.num_hidden_layers)]
    for index, matrices in enumerate(per_layer):
        for role, matrix in matrices.items():
            if matrix != (first := per_layer[0][role]):
                name = f"{family.layers}.{index}.{family.projections[role].module}.weight"
                raise UserError(
                    f"{name} is {matrix}, in layer 0 it is {first}; lrc cannot compress layers that differ in shape yet"
                )
    tables = {role: shapes.get(f"{path}.weight", ()) for role, path in family.outer.items()}
    return Architecture(
        family=family,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=config.vocab_size,
        positions=config.max_position_embeddings,
        matrices=per_layer[0],
        tables={role: Matrix(*shape, bias=False) for role, shape in tables.items() if shape},
        total_parameters=sum(math.prod(shape) for shape in shapes.values()),
    )


def _layer_matrices(
    family: Family, shapes: Mapping[str, tuple[int, ...]], layer: int, rows: Mapping[str, int]
) -> dict[str, Matrix]:
    found = {}
    for role, stored in family.projections.items():
        name = f"{family.layers}.{layer}.{stored.module}"
        if f"{name}.weight" not in shapes:
            raise UserError(
                f"the checkpoint has no tensor {name}.weight (projection {role!r} of layer {layer})"
            )
        shape = shapes[f"{name}.weight"]
        if len(shape) != 2:
            raise UserError(f"{name}.weight has shape {list(shape)}, expected a matrix")
        out, into = reversed(shape) if stored.input_major else shape
        expected = sum(rows[r] for r in stored.fused) if stored.fused else rows.get(role, out)
        if out != expected:
            raise UserError(f"{name}.weight has {out} output rows, config.json says {expected}")
        found[role] = Matrix(rows[role] if stored.fused else out, into, f"{name}.bias" in shapes)
    return found


def canonical(
    family: Family, architecture: Architecture, state: Mapping[str, Tensor], role: str
) -> tuple[Tensor, Tensor | None]:
    """Return a projection's unfused (out, in) weight and (out,) bias as views of a layer's tensors.

    ``state`` holds the tensors of one decoder layer, by path inside the layer.
    """
    stored = family.projections[role]
    weight, bias = state[f"{stored.module}.weight"], state.get(f"{stored.module}.bias")
    if stored.input_major:
        weight = weight.T
    if stored.fused:
        rows = architecture.output_rows(role)
        weight, bias = weight[rows], bias if bias is None else bias[rows]
    return weight, bias
