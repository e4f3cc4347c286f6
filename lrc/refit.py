"""Refit of output projections to the original residual stream: linear regression with a ridge to the solution."""

from __future__ import annotations

import torch
from torch import Tensor

from lrc.linalg import damped_cholesky
from lrc.methods.contract import Affine
from lrc.moments.moment import product

RIDGE = 0.1


class RefitSum:
    """Sums over tokens of what a projection sees on the compressed stream and what it should have put out."""

    def __init__(self, width: int, out: int, device: torch.device) -> None:
        self._gram = torch.zeros(width, width, device=device)
        self._cross = torch.zeros(out, width, device=device)
        self._input = torch.zeros(width, device=device)
        self._target = torch.zeros(out, device=device)
        self._tokens = 0

    def add(self, x: Tensor, target: Tensor) -> None:
        """Count inputs x (..., width) and targets (..., out)."""
        rows, wanted = x.reshape(-1, x.shape[-1]), target.reshape(-1, target.shape[-1])
        self._gram += product(rows, rows)
        self._cross += product(wanted.float(), rows)
        self._input += rows.sum(dim=0, dtype=torch.float32)
        self._target += wanted.sum(dim=0, dtype=torch.float32)
        self._tokens += rows.shape[0]

    def solve(self, start: Affine, ridge: float = RIDGE) -> tuple[Affine, float]:
        """The W, b minimising E‖t − W x − b‖² + λ‖W − W₀‖²_F from the start (W₀, b₀), and the damping used.

        λ is ``ridge`` times the mean diagonal of E[x xᵀ], centred where there is a bias. A projection without a bias
        gets none.
        """
        gram, cross = self._gram.double() / self._tokens, self._cross.double() / self._tokens
        x, t = self._input.double() / self._tokens, self._target.double() / self._tokens
        weight = start.weight.double()
        if start.bias is not None:
            gram, cross = gram - torch.outer(x, x), cross - torch.outer(t, x)
        root = damped_cholesky(gram, ridge)
        fitted = weight + root.solve(cross - weight @ gram)
        bias = None if start.bias is None else t - fitted @ x
        return Affine(fitted, bias), root.damping
