"""Collect second moments of the loss's gradient at the outputs of projections: the Fisher information for methods.

The loss is summed over a block, in nats. Tokens are taken as independent: for gradients g_t and output changes Δy_t,
E(Σ_t g_tᵀ Δy_t)² is approximated by Σ_t E(g_tᵀ Δy_t)². Half its mean over tokens is the rise of the loss in nats per
token (Kronecker-factored curvature, arXiv:1503.05671). The weight of first tokens is in the input moment C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.families import Family, Heads
from lrc.moments.moment import add_gram, mirrored
from lrc.run.processes import Processes

GRADIENTS = "gradients"  # their name in the needs of solvers


@dataclass(frozen=True)
class GradientTargets:
    """Select the moments to collect of one layer: at the outputs of ``roles``, and of the queries."""

    roles: frozenset[str] = frozenset()
    queries: bool = False

    def __bool__(self) -> bool:
        return bool(self.roles) or self.queries


@dataclass(frozen=True)
class GradientMoment:
    """Hold means over ``tokens`` of one layer in float32, where g is the gradient of a block's summed loss.

    ``outputs``, by role: G = E[g gᵀ] (out, out) at the projection's output. Changing W by ΔW costs ½ tr(G ΔW C ΔWᵀ)
    nats per token. ``queries`` are moments of q before rotary embedding:

        rotary       K = E[a aᵀ] (kv_heads, D/2, D/2), a_j = Σ q_j ∂L/∂q_j + q_{j+D/2} ∂L/∂q_{j+D/2} over the query
                     heads that share a key: dropping a set S of pairs costs ½·1_Sᵀ K 1_S nats per token
        not rotary   Σ E[γ γᵀ] (kv_heads, D, D) over the same heads, with γ = ∂L/∂q
    """

    outputs: Mapping[str, Tensor]
    queries: Tensor | None
    tokens: int

    def moved(self, move: Callable[[Tensor], Tensor]) -> GradientMoment:
        """Return the moments with ``move`` applied to every tensor."""
        queries = None if self.queries is None else move(self.queries)
        return GradientMoment({role: move(g) for role, g in self.outputs.items()}, queries, self.tokens)

    def by_target(self, family: Family) -> dict[str, Tensor]:
        """Return the moment for each target: ``queries`` for ``qk``, else G at the target's output."""
        roles = {target: output_role(family, target) for target in ("ov", "mlp", *self.outputs)}
        found = {target: self.outputs[role] for target, role in roles.items() if role in self.outputs}
        return found if self.queries is None else found | {"qk": self.queries}

    @property
    def finite(self) -> bool:
        """Return whether no gradient was NaN or inf."""
        tensors = [*self.outputs.values(), *([] if self.queries is None else [self.queries])]
        return all(bool(tensor.diagonal(dim1=-2, dim2=-1).isfinite().all()) for tensor in tensors)


def output_role(family: Family, target: str) -> str:
    """Return the projection at the output of a target other than ``qk``."""
    return {"ov": "o", "mlp": family.mlp_output}.get(target, target)


class GradientSum:
    """Running sums for a ``GradientMoment``; ``widths`` are the output widths by role."""

    def __init__(
        self, heads: Heads, widths: Mapping[str, int], *, queries: bool, device: torch.device
    ) -> None:
        self._heads, self._rotary = heads, heads.rotary != "none"
        side = heads.head_dim // 2 if self._rotary else heads.head_dim
        self._outputs = {role: torch.zeros(width, width, device=device) for role, width in widths.items()}
        self._queries = torch.zeros(heads.kv_heads, side, side, device=device) if queries else None
        self._tokens = 0

    def add(
        self, gradients: Mapping[str, Tensor], queries: tuple[Tensor, Tensor] | None, scale: Tensor
    ) -> None:
        """Add a batch: gradients (..., out) by role, and the queries (..., heads·D) with their gradient.

        All gradients are multiplied by ``scale``.
        """
        share = scale.float().square().reciprocal()
        for role, gradient in gradients.items():
            add_gram(self._outputs[role], gradient.flatten(0, -2), share)
        if queries is not None and self._queries is not None:
            self._queries += self._of_queries(*queries).mul_(share)
        some = next(iter(gradients.values())) if queries is None else queries[0]
        self._tokens += some.shape[:-1].numel()

    def reduce(self, processes: Processes) -> None:
        """Add the sums of the other processes."""
        processes.sum(*self._outputs.values(), *([] if self._queries is None else [self._queries]))
        self._tokens = processes.total(self._tokens)

    def moment(self) -> GradientMoment:
        """Return the means so far."""
        outputs = {role: mirrored(total / self._tokens) for role, total in self._outputs.items()}
        queries = None if self._queries is None else self._queries / self._tokens
        return GradientMoment(outputs, queries, self._tokens)

    def _of_queries(self, q: Tensor, gradient: Tensor) -> Tensor:
        by_head = (self._heads.kv_heads, -1, self._heads.head_dim)
        q, gradient = (x.float().flatten(0, -2).unflatten(-1, by_head) for x in (q, gradient))
        if self._rotary:
            first, second = (q * gradient).sum(dim=2).chunk(2, dim=-1)
            rows = (first + second).transpose(0, 1)  # (kv_heads, tokens, D/2)
        else:
            rows = gradient.transpose(0, 1).flatten(1, 2)  # (kv_heads, tokens · group, D)
        return rows.mT @ rows
