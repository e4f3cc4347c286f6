"""Solve the refit of one output projection from sums over tokens, by ridge regression toward the method's solution.

The ridge is chosen on held-out calibration blocks, which no moment, gradient or refit has seen. A refit that does not
lower the error on them is not applied. For wide outputs ridges are compared in random directions, which keep the
expected squared error (Johnson and Lindenstrauss) and make a trial cost little more than its Cholesky factor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from pydantic import TypeAdapter
from torch import Tensor

from lrc.maths.linalg import damped_cholesky, data_error
from lrc.methods.contract import Affine
from lrc.moments.moment import add_gram, mirrored, product
from lrc.run.processes import Processes

RIDGE = 0.1  # without held-out blocks
RIDGES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)  # the strongest first, as ties take the first
DIRECTIONS = 256
_LEAST_GAIN = 0.1  # of the root mean square of a norm's gains
_SEED = 0


@dataclass(frozen=True)
class StreamError:
    """E‖x − x̃‖² / E‖x‖² of the compressed residual stream x̃ and the original's x, before and after a refit."""

    before: float
    after: float


@dataclass(frozen=True)
class RefitRecord:
    """Record the refit of one output projection ``role``.

    ``ridge``: as a fraction of the mean diagonal. ``raised``: the larger ridge that the solve needed, None if it needed
    none. ``error``: on the fitted blocks. ``held_out``: on the held-out blocks; None if there is only one block, which
    leaves the ridge at its default. ``applied``: False if the refit does not lower the error on the held-out blocks.
    """

    layer: int
    role: str
    ridge: float
    raised: float | None
    error: StreamError
    held_out: StreamError | None
    applied: bool = True


REFITS = TypeAdapter(list[RefitRecord])  # read back from JSON values


class RefitSum:
    """Sums over tokens for one refit: inputs of the projection, and the residual that its output leaves."""

    def __init__(self, width: int, out: int, device: torch.device) -> None:
        self._fitted, self._held = (_Sums(width, out, device) for _ in range(2))

    def add(self, x: Tensor, goal: Tensor, reached: Tensor, held: bool) -> None:
        """Add inputs x (blocks, tokens, width), the original stream ``goal`` and the compressed one ``reached``.

        The streams are (blocks, tokens, out) in float32. ``reached`` is with the projection before the refit. ``held``:
        the tokens choose the ridge and are not part of the fit that is tried with it.
        """
        (self._held if held else self._fitted).add(x, goal, reached)

    def reduce(self, processes: Processes) -> None:
        """Add the sums of the other processes."""
        for sums in (self._fitted, self._held):
            processes.sum(*sums.tensors)
            sums.tokens = processes.total(sums.tokens)

    def solve(
        self, start: Affine, layer: int, role: str, gain: Tensor | None = None, *, biased: bool = True
    ) -> tuple[Affine, RefitRecord]:
        """Return the W, b minimising E‖t − W x − b‖² + λ‖W − W₀‖²_F, where ``start`` is (W₀, b₀), and the record.

        The target t has t − W₀ x − b₀ = ``goal`` − ``reached``. λ is the ridge times the mean diagonal of E[x xᵀ],
        centred if there is a bias. The ridge is the one of ``RIDGES`` with the least error on the held-out blocks;
        ``start`` is returned if that is not less than its own. With ``gain`` (out,), what is fitted is gain · W and
        gain · b; channels of the smallest gains change less. Without ``biased``, b stays b₀.
        """
        biased = biased and start.bias is not None
        fitted, held = _means(self._fitted), _means(self._held) if self._held.tokens else None
        ridge = RIDGE
        if held:
            fitted_in, held_in = fitted.projected(), held.projected()
            gains = {each: held_in.gained(fitted_in.change(each, biased)[0]) for each in RIDGES}
            ridge = max(gains, key=gains.__getitem__)
            del fitted_in, held_in
        change, damping = fitted.change(ridge, biased)
        raised = None if damping == ridge else damping
        record = RefitRecord(layer, role, ridge, raised, fitted.errors(change), held and held.errors(change))
        if record.held_out and record.held_out.after >= record.held_out.before:
            return start, replace(record, applied=False)
        weight, bias = change.weight, change.bias
        if gain is not None:
            gain = gain.to(weight.device)
            # A channel that the norm nearly removes would ask for a change that the norm's scale cannot bear.
            floor = _LEAST_GAIN * gain.square().mean().sqrt()
            inverse = gain / torch.maximum(gain.square(), floor * floor)
            weight, bias = inverse[:, None] * weight, None if bias is None else inverse * bias
        if start.bias is not None:
            bias = start.bias.double() if bias is None else start.bias.double() + bias
        return Affine(start.weight.double() + weight, bias), record


class _Sums:
    """Sums of x xᵀ, r xᵀ, x, r (float32), ‖r‖² and ‖stream‖² (float64); r is the residual."""

    def __init__(self, width: int, out: int, device: torch.device) -> None:
        shapes = ((width, width), (out, width), (width,), (out,))
        self.tensors = [torch.zeros(shape, device=device) for shape in shapes]
        self.tensors += [torch.zeros((), dtype=torch.float64, device=device) for _ in range(2)]
        self.tokens = 0

    def add(self, x: Tensor, goal: Tensor, reached: Tensor) -> None:
        gram, cross, inputs, residuals, missing, size = self.tensors
        rows, r = x.flatten(0, -2), (goal - reached).flatten(0, -2)
        add_gram(gram, rows)
        cross += product(r, rows)
        inputs += rows.sum(dim=0, dtype=torch.float32)
        residuals += r.sum(dim=0)
        missing += r.square().sum(dim=0).double().sum()
        size += goal.square().sum(dim=(0, 1)).double().sum()
        self.tokens += rows.shape[0]


def _means(sums: _Sums) -> _Means:
    gram, *rest = sums.tensors
    cross, x, r, missing, size = (each.double() / sums.tokens for each in rest)
    return _Means(mirrored(gram / sums.tokens), cross, x, r, float(missing), float(size))


@dataclass(frozen=True)
class _Means:
    """Means over tokens: E[x xᵀ] in float32; E[r xᵀ], E[x], E[r], E‖r‖² and E‖stream‖² in float64."""

    gram: Tensor
    cross: Tensor
    x: Tensor
    r: Tensor
    missing: float
    size: float

    def projected(self) -> _Means:
        """Return the means with a wide r in ``DIRECTIONS`` fixed ones; ``missing`` stays, so only compare gains."""
        if len(self.r) <= DIRECTIONS:
            return self
        generator = torch.Generator(self.r.device).manual_seed(_SEED)
        shape = (DIRECTIONS, len(self.r))
        some = torch.randn(shape, generator=generator, dtype=torch.float64, device=self.r.device)
        return replace(self, cross=some @ self.cross, r=some @ self.r)

    def change(self, ridge: float, biased: bool) -> tuple[Affine, float]:
        """Return the D, d minimising E‖r − D x − d‖² + λ‖D‖²_F, and the damping used."""
        gram, cross = self.gram, self.cross
        if biased:
            gram, cross = gram.double() - torch.outer(self.x, self.x), cross - torch.outer(self.r, self.x)
        root = damped_cholesky(gram, ridge)
        weight = root.solve(cross)
        return Affine(weight, self.r - weight @ self.x if biased else None), root.damping

    def gained(self, change: Affine) -> float:
        """Return E‖r‖² − E‖r − D x − d‖²."""
        weight, bias = change.weight, change.bias
        found = 2 * (self.cross * weight).sum() - data_error(weight, self.gram)
        if bias is not None:
            found -= bias @ (bias - 2 * (self.r - weight @ self.x))
        return float(found)

    def errors(self, change: Affine) -> StreamError:
        """Return the errors without and with D, d."""
        # The difference of float32 sums may round below zero.
        left = max(self.missing - self.gained(change), 0.0)
        return StreamError(self.missing / self.size, left / self.size)
