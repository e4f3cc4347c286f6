"""What an inspection finds, as typed records; ``inspect.json`` holds an ``Inspection``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lrc.methods.sizes import SizeValue
from lrc.records.compression import plain

INSPECTION_VERSION = 2

# What the errors that a choice goes by are: predicted rise of the loss in nats per token, (E‖Δy‖² / E‖y‖²)^½ of the
# target's output, the same of attention scores, or nats of divergence of the attention distribution.
Unit = Literal["nats of loss", "relative error", "relative error of scores", "nats KL"]


@dataclass(frozen=True)
class Spectrum:
    """Singular values σ of which there are ``full``, of a component by head: means over heads, sums in ``energy``.

    ``energy``: share of Σσ² in the r largest, for every r of ``ranks``, which are evenly spaced in their logarithm;
    ``rank_99`` is the least r whose share is 0.99.
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
    """How well the moment at a site can be inverted: E[x xᵀ] (width, width), or where ``centred`` the covariance.

    ``condition``: largest over smallest eigenvalue, inf where that is not above zero; ``damped`` with ``damping`` of
    the mean diagonal added, as methods solve. ``numerical_rank``: eigenvalues above width·ε times the largest, ε being
    that of float32, in which moments are summed.
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
    """What a method would lose at a size, predicted by itself: ``kept`` of ``whole`` weights where ``keep`` was asked.

    ``error`` in ``unit``, of the target's own output; ``loss``: nats per token, where gradients were taken. Run, a
    token goes through ``steps`` matrix products and permutations in place of one product for each projection.
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
    """What ``auto`` takes at a kept fraction, by the least ``error`` in ``unit``, and the next best.

    ``method`` of a component that goes by its projections names the method of each; ``error`` is then the sum of theirs
    in nats, or the largest of theirs where that is no sum. ``kept``: the fraction of the target's weights that the size
    really keeps, as sizes are whole numbers. ``next_method`` and its error in the same unit are None where nothing else
    could be compared.
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
class Held:
    """A target of an output held against the original: as it is stored, refits included.

    ``reconstruction``: ‖W − W'‖ / ‖W‖ in the Frobenius norm; of qk the norms are of W_qᵀ W_k over all heads (with
    rotary positions at distance zero), of ov of O V; None for an MLP, which is no product. ``data_error``: (E‖y − y'‖²
    / E‖y‖²)^½ by the moments, y in the second without its bias, of qk that of the scores of queries and keys that are
    independent; None where the stored tensors are no map of the original's. ``overlap``: mean squared cosine of the
    principal angles (Björck and Golub 1973) between the inputs that are kept and the best ones of the same rank, both
    whitened by the moment, and ``angle`` the largest in degrees; of an MLP the share of its neurons that are among
    those with the largest (C_ii)^½ ‖w_i‖. ``measured`` is by running both on the same tokens; ``kl`` so of qk, in nats.
    ``recorded_`` are what the output's manifest says of it before its refit.
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
    """One target of a layer, or with ``layer`` None outside of them; ``held`` where an output was held against it.

    ``plain`` and ``whitened``: singular values of W and of W C^½; of qk by head of W_qᵀ W_k and C^½ W_qᵀ W_k C^½, of ov
    of O V and O S^½ with S the moment of what the head puts out; of an MLP, whose neurons are kept or not, of each
    neuron ‖w_i‖ and (C_ii)^½ ‖w_i‖; of an embedding E and F^½ E, F being the shares of tokens.
    """

    layer: int | None
    target: str
    plain: Spectrum
    whitened: Spectrum
    estimates: list[Estimate]
    choices: list[Choice]
    held: Held | None = None


@dataclass(frozen=True)
class Inspection:
    """One model looked at on ``calibration``; ``layers``: those that were. ``against``: the output, if any."""

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

    def to_json(self) -> str:
        """The record as JSON; infinite values are written as strings, which JSON has no numbers for."""
        return json.dumps(plain(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
