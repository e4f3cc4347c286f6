"""Collects what a layer's solvers need to know of its activations, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrc.errors import UserError
from lrc.families import canonical
from lrc.modules.attention import turn
from lrc.moments.attention import AttentionMoment, AttentionSum
from lrc.moments.gradient import GradientMoment
from lrc.moments.moment import Moment, MomentSum
from lrc.moments.observe import Call
from lrc.plan.resolved import LayerPlan
from lrc.walk.stream import ModelStream


@dataclass(frozen=True)
class Statistics:
    """Moments by site, and what changes of the scores cost attention, and of outputs the loss, where asked for."""

    moments: Mapping[str, Moment]
    attention: AttentionMoment | None = None
    gradients: GradientMoment | None = None


class LayerSums:
    """Running sums over the calls of one original layer; the first token of a block counts as ``first_token``."""

    def __init__(
        self,
        stream: ModelStream,
        plan: LayerPlan,
        layer: nn.Module,
        state: Mapping[str, Tensor],
        sites: set[str],
        collectors: set[str],
        first_token: int,
    ) -> None:
        self._stream, self._index, self._state = stream, plan.index, state
        self._first_token = first_token
        self._architecture = stream.reader.architecture
        self._sites = {site: path for site, path in self._architecture.family.sites.items() if site in sites}
        widths = {site: self._architecture.site_width(site) for site in self._sites}
        self._moments = {site: MomentSum(width, stream.device) for site, width in widths.items()}
        self._attention: AttentionSum | None = None
        if collectors & {"attention", "attention_samples"}:
            heads = self._architecture.geometry
            scale: Any = layer.get_submodule(self._architecture.family.attention).scaling
            rotary = heads.rotary != "none"
            self._attention = AttentionSum(
                heads.kv_heads,
                heads.head_dim,
                scale,
                rotary,
                stream.device,
                samples="attention_samples" in collectors,
                ranks=stream.ranks,
            )

    @property
    def watched(self) -> dict[str, str]:
        """Submodules whose calls ``add`` needs."""
        attention = {"attention": self._architecture.family.attention} if self._attention else {}
        return self._sites | attention

    @torch.no_grad()
    def add(self, calls: Mapping[str, Call]) -> None:
        """Count the tokens of one call of the layer."""
        for site in self._sites:
            self._moments[site].add(self._stream.cast(calls[site].input), self._first_token)
        if self._attention:
            self._add_attention(self._attention, calls["attention"])

    def results(self, gradients: GradientMoment | None = None) -> Statistics:
        """The means of what all processes have counted, with what a sweep found; the last thing to ask for.

        Raises UserError where activations are NaN or inf.
        """
        for total in self._moments.values():
            total.reduce(self._stream.ranks)
        if self._attention:
            self._attention.reduce()
        moments = {site: total.moment() for site, total in self._moments.items()}
        for site, moment in moments.items():
            if not bool(moment.second.diagonal().isfinite().all()):
                raise UserError(f"layer {self._index}: activations at {site} are NaN or inf")
        attention = self._attention.moment() if self._attention else None
        return Statistics(moments, attention, gradients and gradients.moved(self._stream.fetch))

    def _add_attention(self, total: AttentionSum, call: Call) -> None:
        heads, x = self._architecture.geometry, self._stream.cast(call.input)
        q, k = (self._heads(role, x) for role in ("q", "k"))
        if heads.rotary != "none":
            cos, sin = (table.unsqueeze(1) for table in call.kwargs["position_embeddings"])
            q, k = turn(q, cos, sin), turn(k, cos, sin)
        mask = call.kwargs.get("attention_mask")
        for block in range(x.shape[0]):
            total.add(q[block], k[block], None if mask is None else mask[min(block, mask.shape[0] - 1)])

    def _heads(self, role: str, x: Tensor) -> Tensor:
        """Queries or keys (blocks, heads, tokens, D)."""
        weight, bias = canonical(self._architecture.family, self._architecture, self._state, role)
        bias = None if bias is None else bias.to(x.dtype)
        y = functional.linear(x, weight.to(x.dtype), bias)
        return y.unflatten(-1, (-1, self._architecture.head_dim)).transpose(1, 2)
