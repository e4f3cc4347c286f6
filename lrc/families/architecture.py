"""Describe one model of a family: shapes of its projections, what can shrink, and what stands around its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lrc.errors import UserError
from lrc.families.family import Family, Rotary, Stored
from lrc.families.refusals import check_supported, closed_components

if TYPE_CHECKING:
    from torch import Tensor


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
class LogitRule:
    """What a model does with the head's output z: z · factor / divisor, then c tanh(z / c) with the soft cap c."""

    factor: float = 1.0
    divisor: float = 1.0
    cap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """Return the logits; each step as transformers does it, so that they have the same bits."""
        z = z if self.factor == 1 else z * self.factor
        z = z if self.divisor == 1 else z / self.divisor
        return z if self.cap is None else (z / self.cap).tanh() * self.cap


@dataclass(frozen=True)
class Architecture:
    """Shapes of one model, from its config and the headers of its weights.

    ``tables``: the embedding and, unless tied, the head; one row per token. ``closed``: why a component cannot shrink
    as a whole, for those that cannot. ``parallel``: attention and MLP read the same residual stream.
    ``residual_factor``: of what they add to it. ``embedding_factor``: of what the embedding's module gives.
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
    closed: Mapping[str, str] = field(default_factory=dict)
    parallel: bool = False
    residual_factor: float = 1.0
    embedding_factor: float = 1.0
    logits: LogitRule = LogitRule()

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
            if name not in self.closed
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

    def own(self, role: str, x: Tensor, dim: int = 0) -> Tensor:
        """Return a projection's part of x, whose dimension ``dim`` has the outputs of the module that stores it.

        It is a view, unless the module stores all roles of a head before the next head.
        """
        stored = self.family.projections[role]
        if not stored.fused:
            return x
        place = stored.fused.index(role)
        if stored.order == "by_head":
            dim %= x.ndim
            return (
                x.unflatten(dim, (self.heads, len(stored.fused), -1))
                .select(dim + 1, place)
                .flatten(dim, dim + 1)
            )
        start = sum(self.matrices[r].rows for r in stored.fused[:place])
        return x.narrow(dim, start, self.matrices[role].rows)

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
    """Return a model's architecture from its config and its tensor shapes, by name, which fit each other.

    Raises UserError if the model has unsupported features or layers of different shapes.
    """
    check_supported(family, config)
    heads, kv_heads, head_dim = head_counts(config)
    rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    matrices = {}
    for role, stored in family.projections.items():
        names = [f"{family.layers}.{i}.{stored.module}" for i in range(config.num_hidden_layers)]
        first, *others = (_matrix(stored, role, name, shapes, rows) for name in names)
        for name, other in zip(names[1:], others, strict=True):
            if other != first:
                raise UserError(
                    f"{name}.weight is {other}, in layer 0 it is {first}; lrc cannot compress layers that differ in "
                    "shape yet"
                )
        matrices[role] = first
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
        matrices=matrices,
        tables={role: Matrix(*shape, bias=False) for role, shape in tables.items() if shape},
        total_parameters=sum(math.prod(shape) for shape in shapes.values()),
        closed=closed_components(family, config),
        parallel=getattr(config, family.parallel) if isinstance(family.parallel, str) else family.parallel,
        residual_factor=getattr(config, family.residual_factor) if family.residual_factor else 1.0,
        embedding_factor=config.hidden_size**0.5 if family.embedding_scaled else 1.0,
        logits=logit_rule(family, config),
    )


def logit_rule(family: Family, config: Any) -> LogitRule:
    """Return what a model does with the head's output."""
    keys = {"factor": family.logit_factor, "divisor": family.logit_divisor, "cap": family.logit_cap}
    return LogitRule(**{name: getattr(config, key) for name, key in keys.items() if key})


def head_counts(config: Any) -> tuple[int, int, int]:
    """Return the query heads, the key and value heads, and the width of a head."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _matrix(
    stored: Stored, role: str, name: str, shapes: Mapping[str, tuple[int, ...]], rows: Mapping[str, int]
) -> Matrix:
    """Return the shape of a projection whose module has the full path ``name``."""
    out, into = reversed(shapes[f"{name}.weight"]) if stored.input_major else shapes[f"{name}.weight"]
    if stored.fused:
        out = rows.get(role, out // len(stored.fused))
    return Matrix(out, into, f"{name}.bias" in shapes)


def canonical(
    family: Family, architecture: Architecture, state: Mapping[str, Tensor], role: str
) -> tuple[Tensor, Tensor | None]:
    """Return a projection's unfused (out, in) weight and (out,) bias from a layer's tensors, as ``Architecture.own``.

    ``state`` holds the tensors of one decoder layer, by path inside the layer.
    """
    stored = family.projections[role]
    weight, bias = state[f"{stored.module}.weight"], state.get(f"{stored.module}.bias")
    if stored.input_major:
        weight = weight.T
    return architecture.own(role, weight), None if bias is None else architecture.own(role, bias)
