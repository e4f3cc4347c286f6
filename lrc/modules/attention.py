"""Run attention with fewer query, key and value dimensions than the family's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrc.errors import UserError
from lrc.families import Family, families, head_counts
from lrc.families.refusals import check_supported
from lrc.modules.absent import Absent
from lrc.modules.cache import cache_argument
from lrc.modules.fused.merged import MergesProjections

PREFIX = "Lrc"
# Head widths of fused kernels are multiples of STEP. Other widths are padded with zeros before they are cached: without
# a fused kernel a GPU converts the whole cache to float32 at every token.
STEP = {"cuda": 8}
_classes: dict[str, type[ReducedAttention]] = {}


class ReducedAttention(MergesProjections):
    """Mixin that replaces the forward of a transformers attention class.

    Projections are split, under the names in ``family.split``. Heads are ``qk_dim`` and ``v_dim`` wide; the cache pads
    them to a multiple of ``STEP``. ``rotary_columns`` (kv_heads, qk_dim) holds, for each key head and its queries, the
    columns of cos and sin of the kept dimensions, first halves before second halves; None if all are kept. Scores are
    scaled as for the full head.
    """

    family: ClassVar[Family]
    base: ClassVar[type[nn.Module]]
    cache: ClassVar[str]  # the argument for the KV cache
    qk_dim: int
    v_dim: int
    rotary_columns: Tensor | None
    stock: bool = False  # True: nothing is reduced, and ``fuse`` replaced the family's own class
    num_key_value_groups: int
    head_dim: int
    if TYPE_CHECKING:  # attributes of the class that this one is mixed into
        config: Any
        layer_idx: int
        scaling: float
        q_norm: nn.Module
        k_norm: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        family = self.family
        cache = kwargs.pop(self.cache, None)
        query, key, value = self.project([family.split[role] for role in ("q", "k", "v")], hidden_states)
        norm = family.qk_norm if hasattr(self, "q_norm") else None
        if norm == "width":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (x.unflatten(-1, (-1, self.qk_dim)) for x in (query, key))
        if norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        value = value.unflatten(-1, (-1, self.v_dim))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if position_embeddings is not None and (family.rotates is None or getattr(self, family.rotates)):
            query, key = self._rotate(query, key, *position_embeddings)
        step = STEP.get(query.device.type, 1)
        query, key, value = (_widen(x, x.shape[-1] + -x.shape[-1] % step) for x in (query, key, value))
        if cache is not None:
            self._narrow_prefix(cache, key.shape[-1], value.shape[-1])
            more = {"kwargs": kwargs} if self.cache == "cache" else {}
            key, value = cache.update(key, value, self.layer_idx, **more)
        output, weights = self._attend(query, key, value, attention_mask, **kwargs)
        output = output[..., : self.v_dim].reshape(*hidden_states.shape[:-1], -1)
        output = getattr(self, family.split["o"])(output)
        if family.output_dropout:
            drop = getattr(self, family.output_dropout)
            output = F.dropout(output, drop, self.training) if isinstance(drop, float) else drop(output)
        return output, weights

    def extra_repr(self) -> str:
        return f"qk_dim={self.qk_dim}, v_dim={self.v_dim}, rotary_columns={self.rotary_columns is not None}"

    def _narrow_prefix(self, cache: Any, qk: int, v: int) -> None:
        """Cut a trained prefix of full heads, as PEFT makes it from the config, to the widths of these heads."""
        for held in getattr(cache, "layers", [])[self.layer_idx : self.layer_idx + 1]:
            for name, width in (("keys", qk), ("values", v)):
                states = getattr(held, name, None)
                if states is not None and states.shape[-1] == self.head_dim != width:
                    setattr(held, name, states[..., :width])

    def _rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        fast = self.merged is not None and self.family.rotary == "half" and cos.shape[-1] == self.qk_dim
        if self.rotary_columns is None and not fast:
            # Heads with all dimensions turn as in the family's own class: the logits then have the same bits.
            return sys.modules[self.base.__module__].apply_rotary_pos_emb(query, key, cos, sin)
        if self.rotary_columns is None:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        else:  # (batch, tokens, columns) -> (batch, kv heads, tokens, kept columns)
            cos, sin = (table[..., self.rotary_columns].transpose(1, 2) for table in (cos, sin))
        grouped = query.unflatten(1, (-1, self.num_key_value_groups))
        turned = turn(grouped, cos.unsqueeze(2), sin.unsqueeze(2)).flatten(1, 2)
        return turned, turn(key, cos, sin)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        implementation = self.config._attn_implementation
        # Fused kernels need one width for all three, and flash attention silently crops wider values. For a single
        # token sdpa gains nothing.
        if implementation != "eager" and not (implementation == "sdpa" and query.shape[2] == 1):
            width = max(query.shape[-1], value.shape[-1])
            query, key, value = (_widen(x, width) for x in (query, key, value))
        modeling = sys.modules[self.base.__module__]
        attend = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(
            implementation, modeling.eager_attention_forward
        )
        dropout = attrgetter(self.family.dropout)(self) if self.training else 0.0
        scaling = self.scaling
        if self.family.queries_scaled:
            query, scaling = query * scaling, 1.0
        for name, path in (("sliding_window", self.family.window), ("softcap", self.family.score_cap)):
            if path is not None:
                kwargs[name] = attrgetter(path)(self)
        return attend(self, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def reduce_attention(module: Any, entry: Mapping[str, Any], family: Family) -> None:
    """Turn a family's attention module into its reduced form in place; projections are replaced separately.

    ``entry`` has the head widths ``qk`` and ``v``, and ``rotary_columns``: whether columns are stored. Raises UserError
    for a config or an entry that reduced attention cannot run.
    """
    config = module.config
    check_supported(family, config)
    if not hasattr(module, "scaling"):
        raise UserError(f"compressed attention of {family.model_type} needs transformers 5.15 or newer")
    # transformers before 5.21 takes sdpa by default
    if not family.sdpa and config._attn_implementation == "sdpa":
        raise UserError(
            f"sdpa attention has no soft caps, which {family.model_type} needs; pass attn_implementation='eager'"
        )
    heads, kv_heads, full = head_counts(config)
    qk, rotary = entry["qk"], family.rotary != "none"
    if entry["rotary_columns"] and not rotary:
        raise UserError(
            f"an attention entry has rotary columns, but {family.model_type} has no rotary positions"
        )
    if rotary and not entry["rotary_columns"] and qk != full:
        raise UserError(
            f"an attention entry keeps {qk} of {full} rotary dimensions, but has no rotary columns"
        )
    fused = {family.projections[role].module.removeprefix(f"{family.attention}.") for role in family.split}
    for name in sorted(fused - set(family.split.values())):
        setattr(module, name, Absent(getattr(module, name).weight, sorted(family.split.values())))
    columns = None
    if entry["rotary_columns"]:
        device = next(iter(module.state_dict().values())).device
        columns = torch.empty(kv_heads, qk, dtype=torch.int64, device=device)
    set_class(module, family, qk, entry["v"], columns)
    module.num_key_value_groups, module.head_dim = heads // kv_heads, full


def set_class(module: nn.Module, family: Family, qk: Any, v: Any, columns: Tensor | None) -> None:
    """Make an attention with unfused projections run ``ReducedAttention.forward``."""
    module.__class__ = reduced_class(type(module), family)
    module.register_buffer("rotary_columns", columns)
    module.qk_dim, module.v_dim = qk, v


def reduced_class(base: type[nn.Module], family: Family) -> type[ReducedAttention]:
    """Return the reduced subclass of ``base``, made once; as a subclass, transformers still recognizes it."""
    name = PREFIX + base.__name__
    if name not in _classes:
        facts = {"family": family, "base": base, "cache": cache_argument(base.forward)}
        _classes[name] = type(name, (ReducedAttention, base), facts)
    return _classes[name]


def _widen(x: Tensor, width: int) -> Tensor:
    """Pad x (..., D) with zeros to ``width``."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., D) by rotary tables of its width, dimension i with i + D/2; return it in the dtype of x."""
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)  # in place: three kernels, not five
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned.to(x.dtype)  # the tables of some families are float32


def __getattr__(name: str) -> Any:
    """Return a reduced class by name; pickle needs this in a process that has not made the class yet."""
    if name.startswith(PREFIX):
        from transformers.models.auto.configuration_auto import model_type_to_module_name

        for model_type, family in families().items():
            folder = model_type_to_module_name(model_type)
            modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
            if hasattr(modeling, name.removeprefix(PREFIX)):
                return reduced_class(getattr(modeling, name.removeprefix(PREFIX)), family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
