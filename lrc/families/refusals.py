"""Say what lrc cannot do with a model, from its family and config, before weights are read."""

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
    for key, other in family.equal:
        if (value := getattr(config, key)) != getattr(config, other):
            yield f"{key}={value} beside {other}={getattr(config, other)}"
    if family.experts and (count := getattr(config, family.experts, None) or 0) > 1:
        yield f"experts ({family.experts}={count})"


def closed_components(family: Family, config: Any) -> dict[str, str]:
    """Return why a component cannot shrink as a whole, by its name; its projections can shrink one by one."""
    reasons = list(_query_reasons(family, config))
    return {"qk": " and ".join(reasons)} if reasons else {}


def _query_reasons(family: Family, config: Any) -> Iterator[str]:
    if family.qk_norm and getattr(config, str(family.qk_norm_key), True):
        over = {"head": "each head", "width": "all heads"}[family.qk_norm]
        yield f"a norm over {over} reads all their dimensions"
    if family.rotary == "interleaved":
        yield "rotary embeddings are interleaved"
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get(family.rotary_share, 1.0) if family.rotary_share else 1.0
    if share < 1:
        yield f"rotary embeddings are on a part of each head ({family.rotary_share}={share:g})"
    if family.score_cap and (cap := getattr(config, family.score_cap, None)) is not None:
        yield f"attention scores have a soft cap ({family.score_cap}={cap:g})"
