"""Describe a model family as data: where each projection is stored in a decoder layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    pass

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
    """Attention or MLP of a decoder layer, with its norms.

    ``norm`` reads the residual stream, ``module`` reads the norm's output; all paths are inside the layer. ``reads``:
    the site whose activations each projection reads, by role. ``output``: the role of the last projection.
    ``post_norm``: a norm between the module's output and the residual stream. Either norm may be missing. An MLP whose
    projections lie on the layer itself has the module "".
    """

    name: Literal["attention", "mlp"]
    module: str
    norm: str | None
    reads: Mapping[str, str]
    output: str
    post_norm: str | None = None

    @property
    def entry(self) -> str:
        """Path of the module that reads the residual stream."""
        return self.norm or self.module

    @property
    def targets(self) -> set[str]:
        """Components and projections that a plan can shrink."""
        return {*_COMPONENTS[self.name], *self.reads}


@dataclass(frozen=True)
class Family:
    """Facts of one ``model_type``; module paths are those of its causal language model in transformers.

    Values that differ by model are named: by the key of the config, or by the attribute of the attention module.
    ``lrc.families.refusals`` says what lrc cannot do with a model because of them.
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
    # Starts of tensor names in files, such as those of a multimodal model that holds the decoder, with the model's own.
    old_names: Mapping[str, str] = field(default_factory=dict)
    # Names of projections, by role, where the attention stores them apart.
    split: Mapping[str, str] = field(default_factory=lambda: {r: f"{r}_proj" for r in ATTENTION_ROLES})
    split_mlp: Mapping[str, str] = field(default_factory=dict)  # the same of fused projections of the MLP
    dropout: str = "attention_dropout"  # attribute of the attention module: rate on the attention weights
    output_dropout: str | None = None  # module of the attention, after its output projection
    activation: str = "act_fn"  # attribute of a gated MLP
    norm_epsilon: str | None = None  # attribute of a root-mean-square norm; None for others
    norm_offset: int = 0  # norms multiply by this plus their weight
    # Norm of queries and keys, ``q_norm`` and ``k_norm``: over each head or over all heads together.
    qk_norm: Literal["head", "width"] | None = None
    # Key of the config: whether the model has that norm; None: it has.
    qk_norm_key: str | None = None
    # Key of rope_parameters: fraction of a head's dimensions that are rotated.
    rotary_share: str | None = None
    # Whether the embedding's module multiplies by the square root of the width.
    embedding_scaled: bool = False
    # Whether the attention scales the queries, not the scores: the same but for rounding.
    queries_scaled: bool = False
    # Whether every text must start with the tokenizer's BOS token.
    starts_texts: bool = False
    sdpa: bool = True  # whether transformers runs the family with sdpa attention

    # Attributes of the attention module.
    rotates: str | None = None  # whether this layer has rotary positions
    window: str | None = None  # its sliding window in tokens, if any
    score_cap: str | None = None  # soft cap of the scores; also the key of the config

    # Keys of the config.
    # Whether attention and MLP read the same residual stream; True: in all models.
    parallel: str | bool = False
    residual_factor: str | None = None  # of what attention and MLP add to the residual stream
    logit_factor: str | None = None
    logit_divisor: str | None = None
    logit_cap: str | None = None  # soft cap
    experts: str | None = None  # number of experts
    # Pairs of keys that must have the same value.
    equal: tuple[tuple[str, str], ...] = ()
    # The value that lrc cannot handle, by config key.
    unsupported: Mapping[str, object] = field(default_factory=dict)

    def own_name(self, name: str) -> str:
        """Return the name in the model of a tensor in a file."""
        found = ((old, own) for old, own in self.old_names.items() if name.startswith(old))
        return next((own + name.removeprefix(old) for old, own in found), name)

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

    @property
    def splits(self) -> dict[str, Mapping[str, str]]:
        """Names of the projections by role where a module stores them apart, by its path inside the layer."""
        return {self.attention: self.split, **({self.mlp: self.split_mlp} if self.split_mlp else {})}

    def path(self, role: str, split: Collection[str] = ()) -> str:
        """Return a projection's path inside the layer, if the modules ``split`` of the layer store theirs apart."""
        apart = (
            f"{home}.{names[role]}" for home, names in self.splits.items() if home in split and role in names
        )
        return next(apart, self.projections[role].module)

    @property
    def mlp_names(self) -> list[str]:
        """Names of the projections inside the MLP, the output projection last, if they are stored apart."""
        paths = (self.path(role, self.splits) for role in (*self.mlp_inputs, self.mlp_output))
        return [path.removeprefix(f"{self.mlp}.") for path in paths]
