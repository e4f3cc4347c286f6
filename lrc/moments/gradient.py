"""Second moments of the loss's gradient at the outputs of projections: the Fisher information that methods weigh by.

The loss is the sum of a block's nats, so that gradients are of the size of one token's loss. Tokens are taken as
independent: of the gradients g_t and changes Δy_t of a block, E(Σ_t g_tᵀ Δy_t)² is read as Σ_t E(g_tᵀ Δy_t)². Half the
mean over tokens is then the rise of the loss in nats per token (Kronecker-factored curvature, arXiv:1503.05671), in
which first tokens weigh as they do in the moments C of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.families import Family
from lrc.moments.moment import add_gram, whole
from lrc.run.processes import Processes

GRADIENTS = "gradients"  # what solvers call them in their needs


@dataclass(frozen=True)
class Wanted:
    """What is collected of one layer: G at the outputs of ``roles``, and the moment of the queries."""

    roles: frozenset[str] = frozenset()
    queries: bool = False

    def __bool__(self) -> bool:
        return bool(self.roles) or self.queries


@dataclass(frozen=True)
class GradientMoment:
    """Means over ``tokens`` of one layer, g_t being the gradient of a block's summed nats, float32.

    ``outputs``, by role: G = E[g gᵀ] (out, out) at the projection's output; ½ tr(G ΔW C ΔWᵀ) is the rise of the loss in
    nats per token. ``queries``, of q as projected, before it is turned: with rotary positions (kv_heads, D/2, D/2)
    E[a aᵀ], a_j = Σ q_j ∂L/∂q_j + q_{j+D/2} ∂L/∂q_{j+D/2} over the query heads that share a key, so that dropping the
    pairs D costs ½·1_Dᵀ K 1_D nats per token; else (kv_heads, D, D), the sum of those heads' E[γ γᵀ], γ = ∂L/∂q.
    """

    outputs: Mapping[str, Tensor]
    queries: Tensor | None
    tokens: int

    def moved(self, move: Callable[[Tensor], Tensor]) -> GradientMoment:
        """The same with every tensor where ``move`` puts it."""
        queries = None if self.queries is None else move(self.queries)
        return GradientMoment({role: move(g) for role, g in self.outputs.items()}, queries, self.tokens)

    def by_target(self, family: Family) -> dict[str, Tensor]:
        """Return what the solver of each target reads: the queries', or G of the output of the target."""
        roles = {target: output_role(family, target) for target in ("ov", "mlp", *self.outputs)}
        found = {target: self.outputs[role] for target, role in roles.items() if role in self.outputs}
        return found if self.queries is None else found | {"qk": self.queries}

    @property
    def finite(self) -> bool:
        """Whether no gradient was NaN or inf."""
        tensors = [*self.outputs.values(), *([] if self.queries is None else [self.queries])]
        return all(bool(tensor.diagonal(dim1=-2, dim2=-1).isfinite().all()) for tensor in tensors)


def output_role(family: Family, target: str) -> str:
    """Return the projection whose output is that of a target other than ``qk``."""
    return {"ov": "o", "mlp": family.mlp_output}.get(target, target)


class GradientSum:
    """Running sums behind a ``GradientMoment`` of one layer: of outputs by role and width, and of the queries."""

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        rotary: bool,
        widths: Mapping[str, int],
        *,
        queries: bool,
        device: torch.device,
    ) -> None:
        self._kv_heads, self._head_dim, self._rotary = kv_heads, head_dim, rotary
        side = head_dim // 2 if rotary else head_dim
        self._outputs = {role: torch.zeros(width, width, device=device) for role, width in widths.items()}
        self._queries = torch.zeros(kv_heads, side, side, device=device) if queries else None
        self._tokens = 0

    def add(
        self, gradients: Mapping[str, Tensor], queries: tuple[Tensor, Tensor] | None, scale: Tensor
    ) -> None:
        """Count a batch: gradients (..., out) by role, and the queries (..., heads·D) with the gradient at them.

        All gradients are ``scale`` times the loss's own.
        """
        share = scale.float().square().reciprocal()
        for role, gradient in gradients.items():
            rows = gradient.flatten(0, -2)
            add_gram(self._outputs[role], rows, share)
        if queries is not None and self._queries is not None:
            self._queries += self._of_queries(*queries).mul_(share)
        some = next(iter(gradients.values())) if queries is None else queries[0]
        self._tokens += some.shape[:-1].numel()

    def reduce(self, processes: Processes) -> None:
        """Add what the other processes have counted."""
        processes.sum(*self._outputs.values(), *([] if self._queries is None else [self._queries]))
        self._tokens = processes.total(self._tokens)

    def moment(self) -> GradientMoment:
        """The means so far."""
        outputs = {role: whole(total / self._tokens) for role, total in self._outputs.items()}
        return GradientMoment(
            outputs, None if self._queries is None else self._queries / self._tokens, self._tokens
        )

    def _of_queries(self, q: Tensor, gradient: Tensor) -> Tensor:
        q, gradient = (x.float().flatten(0, -2).unflatten(-1, self._by_head) for x in (q, gradient))
        if self._rotary:
            first, second = (q * gradient).sum(dim=2).chunk(2, dim=-1)
            rows = (first + second).transpose(0, 1)  # (kv_heads, tokens, D/2)
        else:
            rows = gradient.transpose(0, 1).flatten(1, 2)  # (kv_heads, tokens · group, D)
        return rows.mT @ rows

    @property
    def _by_head(self) -> tuple[int, int, int]:
        return self._kv_heads, -1, self._head_dim
