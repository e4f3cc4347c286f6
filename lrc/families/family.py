"""What a model family is: where each projection lies in a decoder layer, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from lrc.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Component = Literal["qk", "ov", "mlp"]
ATTENTION_ROLES = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Stored:
    """Where one projection is stored in a decoder layer.

    ``module`` is the path inside the layer; ``fused`` lists the roles that share that module's output rows, in
    order; ``input_major`` marks weights kept as (in, out), as GPT-2's Conv1D does.
    """

    module: str
    fused: tuple[str, ...] = ()
    input_major: bool = False


@dataclass(frozen=True)
class Family:
    """The facts of one ``model_type``; paths of modules are those of its causal language model in transformers."""

    model_type: str
    prefix: str  # of the base model; older checkpoints leave it out of their tensor names
    layers: str
    attention: str
    mlp: str
    mlp_norm: str  # its input is the residual stream between the two halves of the layer
    projections: Mapping[str, Stored]
    final_norm: str
    embedding: str  # of tokens; the head's weight too where they are tied
    rotary: Literal["none", "half"]  # "half": dimension i turns with i + head_dim/2
    head: str = "lm_head"
    split: Mapping[str, str] = field(default_factory=lambda: {r: f"{r}_proj" for r in ATTENTION_ROLES})
    dropout: str = "attention_dropout"  # attribute of the attention module: the rate on the attention weights
    output_dropout: str | None = None  # module of the attention, behind its output projection
    activation: str = "act_fn"  # attribute of a gated MLP
    norm_epsilon: str | None = None  # attribute of a root-mean-square norm; None for others
    stale: tuple[str, ...] = ()  # endings of tensors that old checkpoints hold and no module reads
    unsupported: Mapping[str, object] = field(
        default_factory=dict
    )  # config key -> the value lrc cannot handle

    @property
    def mlp_inputs(self) -> tuple[str, ...]:
        """Roles whose product or activation is the MLP's hidden state."""
        return ("gate", "up") if "gate" in self.projections else ("fc_in",)

    @property
    def mlp_output(self) -> str:
        """Role of the projection that closes the MLP."""
        return "down" if "gate" in self.projections else "fc_out"

    def component(self, name: Component) -> tuple[str, ...]:
        """Roles of a component."""
        groups = {"qk": ("q", "k"), "ov": ("v", "o"), "mlp": (*self.mlp_inputs, self.mlp_output)}
        return groups[name]

    def site(self, role: str) -> str:
        """The place whose activations a projection reads."""
        sites = {"q": "attn_in", "k": "attn_in", "v": "attn_in", "o": "o_in", self.mlp_output: "down_in"}
        return sites.get(role, "mlp_in")

    @property
    def outer(self) -> dict[str, str]:
        """Module of each projection outside the decoder layers."""
        return {"embed": self.embedding, "lm_head": self.head}

    @property
    def sites(self) -> dict[str, str]:
        """Module whose input is observed at each site."""
        roles = {"attn_in": "q", "o_in": "o", "mlp_in": self.mlp_inputs[0], "down_in": self.mlp_output}
        return {site: self.projections[role].module for site, role in roles.items()}

    def split_module(self, role: str) -> str:
        """Path, inside the layer, of a projection once its attention is stored split."""
        return f"{self.attention}.{self.split[role]}" if role in self.split else self.projections[role].module


@dataclass(frozen=True)
class Matrix:
    """Shape of one projection in canonical (out, in) orientation."""

    rows: int
    columns: int
    bias: bool

    @property
    def parameters(self) -> int:
        """Weights, without the bias."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Heads:
    """Head geometry; ``rotary`` says how positions enter the scores."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary: Literal["none", "half"] = "none"

    @property
    def group(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Target:
    """Something a plan can shrink: a component or one projection.

    ``full`` is its size when whole and ``step`` the smallest legal change of it; for a component each unit of size
    holds ``unit`` weights.
    """

    name: str
    matrices: Mapping[str, Matrix]
    full: int
    step: int
    unit: int

    @property
    def parameters(self) -> int:
        """Weights when whole, without biases."""
        return sum(matrix.parameters for matrix in self.matrices.values())


@dataclass(frozen=True)
class Architecture:
    """One model's shapes, read from its config and the headers of its weights.

    ``tables``: the embedding and, unless that is its weight too, the head, with a row for each token.
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
        """Every component and projection of a layer, by name."""
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
        """What a plan can shrink outside the layers, by name."""
        return {role: _single(role, table) for role, table in self.tables.items()}

    @property
    def tied(self) -> bool:
        """Whether the embedding is the head's weight too."""
        return "lm_head" not in self.tables

    @property
    def geometry(self) -> Heads:
        """Head geometry of a layer."""
        return Heads(self.heads, self.kv_heads, self.head_dim, self.family.rotary)

    def output_rows(self, role: str) -> slice:
        """A projection's rows among the outputs of the module that stores it."""
        fused = self.family.projections[role].fused
        start = sum(self.matrices[r].rows for r in fused[: fused.index(role)]) if fused else 0
        return slice(start, start + self.matrices[role].rows)

    def site_width(self, site: str) -> int:
        """Size of the activations at a site."""
        roles = (role for role in self.matrices if self.family.site(role) == site)
        return self.matrices[next(roles)].columns

    @property
    def layer_parameters(self) -> int:
        """Weights of one decoder layer's projections: what ``keep`` is a fraction of."""
        return sum(matrix.parameters for matrix in self.matrices.values())


def _single(role: str, matrix: Matrix) -> Target:
    return Target(role, {role: matrix}, min(matrix.rows, matrix.columns), 1, matrix.rows + matrix.columns)


def describe(family: Family, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """Read a model's architecture from its config and the shapes of its tensors, by name.

    Raises UserError where a tensor of a projection is missing, or the layers differ in shape.
    """
    for key, value in family.unsupported.items():
        if getattr(config, key, None) == value:
            raise UserError(f"config.json: {key}={value!r} is not supported for {family.model_type}")
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    per_layer = [_layer_matrices(family, shapes, i, rows) for i in range(config.num_hidden_layers)]
    for i, matrices in enumerate(per_layer):
        if matrices != per_layer[0]:
            raise UserError(f"layer {i} has other shapes than layer 0; lrc needs layers that are alike")
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
    """Return a projection as an unfused (out, in) weight and its (out,) bias, views of a layer's tensors.

    ``state`` holds the tensors of one decoder layer by their path inside it.
    """
    stored = family.projections[role]
    weight, bias = state[f"{stored.module}.weight"], state.get(f"{stored.module}.bias")
    if stored.input_major:
        weight = weight.T
    if stored.fused:
        rows = architecture.output_rows(role)
        weight, bias = weight[rows], bias if bias is None else bias[rows]
    return weight, bias
