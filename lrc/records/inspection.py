"""The result of ``lrc inspect``, as ``inspect.json`` holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lrc.methods.sizes import SizeValue

INSPECTION_VERSION = 3

# Errors by which methods are compared: predicted rise of the loss in nats per token, (E‖Δy‖² / E‖y‖²)^½ of the
# target's output, the same of attention scores, or nats of divergence of the attention distribution.
Unit = Literal["nats of loss", "relative error", "relative error of scores", "nats KL"]


@dataclass(frozen=True)
class Spectrum:
    """Figures of ``full`` singular values σ; for a component means over heads, and sums in ``energy``.

    ``energy``: share of Σσ² in the r largest, for each r of ``ranks``; ``rank_99``: the least r whose share is 0.99.
    ``effective_rank``: exp(−Σ p ln p) for p = σ / Σσ (Roy and Vetterli, EUSIPCO 2007). ``stable_rank``: Σσ² / σ₁²
    (Rudelson and Vershynin 2007).
    """

    full: int
    effective_rank: float
    stable_rank: float
    rank_99: int
    ranks: list[int]
    energy: list[float]


@dataclass(frozen=True)
class Conditioning:
    """How well the moment at a site can be inverted: E[x xᵀ] (width, width), or if ``centred`` the covariance.

    ``condition``: largest over smallest eigenvalue, inf if the smallest is not positive; ``damped``: with ``damping``
    of the mean diagonal added. ``numerical_rank``: eigenvalues above width·ε times the largest, ε of float32.
    """

    layer: int
    site: str
    width: int
    tokens: int
    centred: bool
    condition: float
    damped: float
    damping: float
    numerical_rank: int


@dataclass(frozen=True)
class Estimate:
    """A method's predicted error at a size: ``kept`` of ``whole`` weights where ``keep`` was requested.

    ``error``: of the target's own output, in ``unit``. ``loss``: nats per token, with gradients only. ``steps``: matrix
    products and permutations of a forward pass, in place of one product for each projection.
    """

    keep: float
    method: str
    options: dict[str, Any]
    size: SizeValue
    kept: int
    whole: int
    error: float
    unit: Unit
    loss: float | None
    steps: int


@dataclass(frozen=True)
class Choice:
    """The best method at a kept fraction, by ``error``, and the next best (``lrc.inspection.best``).

    For a component compressed by projection, ``method`` names the method of each, and ``error`` is the sum in nats, or
    the largest of relative errors. ``kept``: the fraction that the size keeps, as sizes are whole numbers. The fields
    ``next_`` are None if no other method could be compared.
    """

    keep: float
    method: str
    error: float
    unit: Unit
    kept: float
    next_method: str | None = None
    next_error: float | None = None
    next_kept: float | None = None


@dataclass(frozen=True)
class OutputErrors:
    """A target of an output compared with the original: as it is stored, refits included.

    ``reconstruction``: ‖W − W'‖ / ‖W‖ in the Frobenius norm. For qk, W is W_qᵀ W_k over all heads (rotary positions at
    distance zero), for ov O V; None for an MLP. ``data_error``: (E‖y − y'‖² / E‖y‖²)^½ by the moments, y in the second
    without its bias. For qk, y are the scores of independent queries and keys; None if the stored tensors are not a map
    of the original's. ``overlap``: mean squared cosine of the principal angles (Björck and Golub 1973) between the kept
    inputs and the best ones of that rank, both whitened; ``angle``: the largest, in degrees. For an MLP ``overlap`` is
    the share of its neurons among those with the largest (C_ii)^½ ‖w_i‖. ``measured``, and ``kl`` of qk in nats: by
    running both on the same tokens. ``recorded_``: from the output's manifest, before the refit.
    """

    method: str
    size: SizeValue | None
    kept: int
    whole: int
    reconstruction: float | None
    data_error: float | None
    overlap: float | None
    angle: float | None
    measured: float | None
    kl: float | None
    recorded_predicted: float | None
    recorded_measured: float | None
    recorded_unit: Unit | None


@dataclass(frozen=True)
class Inspected:
    """One target; ``layer`` is None outside the layers. ``output``: the comparison with an output, if any.

    ``plain`` and ``whitened``: singular values of W and W C^½. For qk, by head: W_qᵀ W_k and C^½ W_qᵀ W_k C^½. For ov:
    O V and O S^½, S the moment of the head's output. For an MLP: ‖w_i‖ and (C_ii)^½ ‖w_i‖ by neuron. For an embedding:
    E and F^½ E, F the token frequencies.
    """

    layer: int | None
    target: str
    plain: Spectrum
    whitened: Spectrum
    estimates: list[Estimate]
    choices: list[Choice]
    output: OutputErrors | None = None


@dataclass(frozen=True)
class Inspection:
    """One model, inspected in ``layers`` on ``calibration``. ``against``: the output that it is compared with."""

    model: str
    fingerprint: str
    layers: list[int]
    keeps: list[float]
    gradients: bool
    calibration: str
    device: str
    dtype: str
    targets: list[Inspected]
    moments: list[Conditioning]
    against: str | None
    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    warnings: list[str]
    versions: dict[str, str]
    version: int = INSPECTION_VERSION
