"""Refuse models with unsupported features, from their family and config, before weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lrc.errors import UserError

if TYPE_CHECKING:
    from lrc.families.family import Family


def check_supported(family: Family, config: Any) -> None:
    """Raise UserError listing every feature of the model that lrc does not support."""
    if reasons := list(_refusals(family, config)):
        raise UserError(f"config.json: {family.model_type} is not supported with {'; '.join(reasons)}")


def _refusals(family: Family, config: Any) -> Iterator[str]:
    for key, value in family.unsupported.items():
        if getattr(config, key, None) == value:
            yield f"{key}={value!r}"
    if family.parallel:
        yield "attention and MLP in parallel (the refit needs one after the other)"
    for half in family.halves:
        if half.post_norm is not None:
            yield f"a norm after {half.module} ({half.post_norm}), which the refit does not support"
    if family.norm_offset:
        yield f"norms that multiply by {family.norm_offset} + w, which the logit scale and fused norms do not support"
    if family.experts and (count := getattr(config, family.experts, None) or 0) > 1:
        yield f"experts ({family.experts}={count})"
    fused = {stored.module for stored in family.projections.values() if stored.order == "by_head"}
    for module in sorted(fused):
        yield f"queries, keys and values fused head by head ({module})"
    if family.rotary == "interleaved":
        yield "rotary positions that rotate neighbouring dimensions"
    share = getattr(config, family.rotary_share, None) if family.rotary_share else 1.0
    if share is None:
        share = (getattr(config, "rope_parameters", None) or {}).get(family.rotary_share, 1.0)
    if share < 1:
        yield f"rotary positions on a part of each head ({family.rotary_share}={share:g})"
    if family.qk_norm:
        yield f"norms of queries and keys (over the {family.qk_norm})"
    for key in family.soft_caps:
        if (cap := getattr(config, key, None)) is not None:
            yield f"soft caps ({key}={cap:g})"
    window = getattr(config, family.window, None) if family.window else None
    if window is not None and window < config.max_position_embeddings:
        yield f"a sliding window ({family.window}={window})"
