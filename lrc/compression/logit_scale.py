"""Scale the logits of a compressed model toward the original: by one factor, then by one for each channel.

With p the original's next-token distribution, z the compressed logits and q = softmax(s z), the factor s minimises
KL(p‖q) = E_p[log p] − s E_p[z] + log Σ exp(s z). It is convex in s, with slope E_q[z] − E_p[z] and curvature Var_q[z]
(temperature scaling, arXiv:1706.04599). Factors v of the channels of the final norm minimise the same divergence plus
‖v − s‖² / (2 ``SPREAD``² tokens), also convex: the most probable factors if they vary by ``SPREAD`` around s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from lrc.errors import UserError
from lrc.run.processes import ALONE, Processes
from lrc.walk.stream import Tail

LEAST, MOST = 0.1, 10.0
CHUNK_BYTES = 2**27  # float32 logits of a chunk
SPREAD = 0.1  # of the channels' factors
_STEPS, _PRECISION = 50, 1e-6
_CHANNEL_STEPS = 20


@dataclass(frozen=True)
class LogitScale:
    """Hold the fitted factor, and KL(p‖q) in nats per token before and after scaling.

    Both are means over ``tokens`` of the calibration text that no other fit has seen. ``channels``: the least and the
    largest factor of a channel, None with one factor for all.
    """

    value: float
    before: float
    after: float
    tokens: int
    channels: tuple[float, float] | None = None

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
        by = "" if self.channels is None else ", its channels by {:.3f} to {:.3f}".format(*self.channels)
        return (
            f"logits scaled by {self.value:.3f} in the final norm{by}; KL divergence from the original on "
            f"{self.tokens:,} calibration tokens that no other fit has used: {self.before:.4g} nats before, "
            f"{self.after:.4g} after"
        )


@dataclass(frozen=True)
class Final:
    """Outputs (..., hidden) of a model's last layer, and its final norm and head."""

    states: Sequence[Tensor]
    logits: Tail

    @torch.no_grad()
    def probabilities(self, states: Tensor) -> Tensor:
        """Return the next-token distributions (rows, vocab), float32, of states (rows, hidden)."""
        return self.logits(states).float().softmax(dim=-1)


@torch.no_grad()
def fit_scale(original: Final, compressed: Final, vocab: int, processes: Processes = ALONE) -> LogitScale:
    """Return the scale from 0.1 to 10 that minimises the KL divergence from the original, over all processes' tokens.

    Uses Newton's method, with bisection if a step leaves the bracket. Each step computes the logits again, in chunks.
    Raises UserError if the divergence is NaN or inf.
    """
    old, new = _chunks(original, vocab), _chunks(compressed, vocab)
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


def fit_channels(
    original: Final,
    compressed: Final,
    scale: LogitScale,
    hidden: int,
    vocab: int,
    processes: Processes = ALONE,
) -> tuple[Tensor, LogitScale]:
    """Return factors (hidden,), float64, for the channels of the final norm, and ``scale`` with what they reach.

    Uses L-BFGS from the fitted ``scale``; each step computes the compressed logits of all processes' tokens again. The
    logits z are linear in the factors, so E_p[z] is too: no step computes the original's logits. Raises UserError if
    the divergence is NaN or inf.
    """
    old, new = _chunks(original, vocab), _chunks(compressed, vocab)
    stiffness = 1 / (SPREAD**2 * scale.tokens)

    def means(factors: np.ndarray, each: Sequence[Callable[[Tensor], Tensor]]) -> tuple[float, np.ndarray]:
        """Return the mean over tokens of what functions of a chunk's logits sum, and its gradient in the factors."""
        found = []
        for chunk, function in zip(new, each, strict=True):
            v = torch.tensor(factors, dtype=torch.float32, device=chunk.device, requires_grad=True)
            with torch.enable_grad():
                value = function(compressed.logits(chunk, v).float())
            (gradient,) = torch.autograd.grad(value, v)
            found.append(torch.cat([value.detach()[None], gradient.double()]))
        # A process may have no blocks.
        own = torch.stack(found).sum(dim=0).cpu() if found else torch.zeros(1 + hidden, dtype=torch.float64)
        mean = processes.total(own) / scale.tokens
        return float(mean[0]), mean[1:].numpy()

    def expected(chunk: Tensor, z: Tensor) -> Tensor:
        """Return the sum over a chunk's tokens of E_p[z]."""
        return (original.probabilities(chunk) * z).sum(dim=-1).double().sum()

    start = np.full(hidden, scale.value)
    weighed = [partial(expected, chunk) for chunk in old]
    level, pull = means(start, weighed)
    certainty = float(processes.total(_certainty(original, old)) / scale.tokens)

    def at(factors: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the divergence and its gradient."""
        partition, gradient = means(factors, [_partition] * len(new))
        return certainty - level - float(pull @ (factors - start)) + partition, gradient - pull

    def penalized(factors: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the objective and its gradient, computed by all processes at the factors of the first."""
        kl, gradient = at(processes.share(factors))
        off = factors - scale.value
        return kl + stiffness / 2 * float(off @ off), gradient + stiffness * off

    best = start
    if processes.first:
        options = {"maxiter": _CHANNEL_STEPS}
        best = minimize(penalized, start, jac=True, method="L-BFGS-B", options=options).x
        processes.share(None)
    else:
        while (asked := processes.share(None)) is not None:
            at(asked)
    best = processes.share(best)
    # In half precision E_p[z] is linear only up to rounding, so it is computed again for the figure that is reported.
    (reached, _), (partition, _) = (means(best, each) for each in (weighed, [_partition] * len(new)))
    kl = certainty - reached + partition
    if not (math.isfinite(kl) and np.isfinite(best).all()):
        raise UserError("the factors of the final norm's channels are NaN or inf; set scale: logits")
    channels = float(best.min()), float(best.max())
    return torch.from_numpy(best), replace(scale, after=kl, channels=channels)


def _chunks(model: Final, vocab: int) -> list[Tensor]:
    """Return the states in parts (rows, hidden) whose logits fit ``CHUNK_BYTES``."""
    rows = max(CHUNK_BYTES // (4 * vocab), 1)
    return [chunk for states in model.states for chunk in states.flatten(0, -2).split(rows)]


def _certainty(original: Final, chunks: Sequence[Tensor]) -> Tensor:
    """Return the float64 sum over tokens of E_p[log p]."""
    found = torch.zeros((), dtype=torch.float64)
    for chunk in chunks:
        found -= torch.special.entr(original.probabilities(chunk)).sum(dim=-1).double().sum().cpu()
    return found


def _partition(z: Tensor) -> Tensor:
    """Return the float64 sum over tokens of log Σ exp(z)."""
    return z.logsumexp(dim=-1).double().sum()


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
