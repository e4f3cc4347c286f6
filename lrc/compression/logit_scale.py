"""Fit one factor for the logits of a compressed model: temperature scaling (arXiv:1706.04599) to the original.

With p the original's next-token distribution, z the compressed logits and q = softmax(s z), the factor s minimises
KL(p‖q) = E_p[log p] − s E_p[z] + log Σ exp(s z). It is convex in s, with slope E_q[z] − E_p[z] and curvature Var_q[z].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.errors import UserError
from lrc.run.processes import ALONE, Processes

LEAST, MOST = 0.1, 10.0
CHUNK_BYTES = 2**27  # float32 logits of a chunk
_STEPS, _PRECISION = 50, 1e-6


@dataclass(frozen=True)
class LogitScale:
    """Hold the fitted factor, and KL(p‖q) in nats per token before and after scaling.

    Both are means over ``tokens`` of the calibration text. The compression was fitted to that text, so the best factor
    for other text may differ, and its gain may be smaller.
    """

    value: float
    before: float
    after: float
    tokens: int

    @property
    def warnings(self) -> list[str]:
        """Return a warning if the scale ends at its limit."""
        if LEAST * 1.01 < self.value < MOST * 0.99:
            return []
        return [
            f"the logit scale ends at its limit, {self.value:.3g}: the compressed model's logits hardly follow the "
            "original's; keep more weights, or set scale: none"
        ]

    @property
    def text(self) -> str:
        """Return the scale in words."""
        return (
            f"logits scaled by {self.value:.3f} in the final norm; KL divergence from the original on {self.tokens:,} "
            f"calibration tokens, which the fits have used too: {self.before:.4g} nats before, {self.after:.4g} after"
        )


@dataclass(frozen=True)
class Final:
    """Outputs (..., hidden) of a model's last layer, and a function from (tokens, hidden) to logits (tokens, vocab)."""

    states: Sequence[Tensor]
    logits: Callable[[Tensor], Tensor]


@torch.no_grad()
def fit_scale(original: Final, compressed: Final, vocab: int, processes: Processes = ALONE) -> LogitScale:
    """Return the scale from 0.1 to 10 that minimises the KL divergence from the original, over all processes' tokens.

    Uses Newton's method, with bisection if a step leaves the bracket. Each step computes the logits again, in chunks.
    Raises UserError if the divergence is NaN or inf.
    """
    rows = max(CHUNK_BYTES // (4 * vocab), 1)
    old, new = (
        [chunk for states in model.states for chunk in states.flatten(0, -2).split(rows)]
        for model in (original, compressed)
    )
    tokens, logits = processes.total(sum(len(chunk) for chunk in new)), compressed.logits

    def means(sums: list[Tensor]) -> list[float]:
        # A process may have no blocks.
        own = torch.stack(sums).sum(dim=0) if sums else torch.zeros((), dtype=torch.float64)
        return (processes.total(own) / tokens).tolist()

    pairs = zip(old, new, strict=True)
    certainty, expected = means([_fixed(original.logits(a).float(), logits(b).float()) for a, b in pairs])

    def at(scale: float) -> tuple[float, float, float]:
        """Return KL, slope and curvature."""
        partition, mean, variance = means([_moving(logits(chunk).float(), scale) for chunk in new])
        return certainty - scale * expected + partition, mean - expected, variance

    low, high, scale = LEAST, MOST, 1.0
    before, slope, curvature = found = at(scale)
    if not math.isfinite(before):
        raise UserError(
            "the KL divergence of the compressed model's logits from the original's is NaN or inf"
        )
    for _ in range(_STEPS):
        low, high = (low, scale) if slope > 0 else (scale, high)
        step = scale - slope / curvature if curvature > 0 else low
        step = step if low < step < high else (low + high) / 2
        if abs(step - scale) < _PRECISION * scale:
            break
        scale = step
        found = _, slope, curvature = at(scale)
    return LogitScale(scale, before, found[0], tokens)


def _fixed(original: Tensor, compressed: Tensor) -> Tensor:
    """Return float64 sums over tokens of E_p[log p] and E_p[z]."""
    log_p = original.log_softmax(dim=-1)
    p = log_p.exp()
    return torch.stack([(p * log_p).sum(-1).double().sum(), (p * compressed).sum(-1).double().sum()])


def _moving(z: Tensor, scale: float) -> Tensor:
    """Return float64 sums over tokens of log Σ exp(s z), E_q[z] and Var_q[z]."""
    scaled = scale * z
    partition, q = scaled.logsumexp(dim=-1), scaled.softmax(dim=-1)
    mean = (q * z).sum(dim=-1, keepdim=True)
    variance = (q * (z - mean).square()).sum(dim=-1)
    return torch.stack([each.double().sum() for each in (partition, mean, variance)])
