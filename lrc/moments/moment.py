"""Second moment and mean of the activations at one site, summed in float32."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.errors import UserError
from lrc.families import Family
from lrc.moments.observe import Call
from lrc.moments.statistic import Layer, Statistic
from lrc.run.processes import Processes

GRAM_BLOCK = 2048  # columns; narrower products are slow on a GPU

# The site of a component's moment; a projection's site is its own input.
COMPONENT_SITES = {"qk": "attn_in", "ov": "o_in", "mlp": "down_in"}


def site_of(family: Family, target: str) -> str:
    """Return the site of the moment in a target's problem."""
    return COMPONENT_SITES.get(target) or family.site(target)


@dataclass(frozen=True)
class Moment:
    """E[x xᵀ] (n, n) and E[x] (n,) of the inputs at a site, over ``tokens``."""

    second: Tensor
    mean: Tensor
    tokens: int

    @property
    def centred(self) -> Tensor:
        """Return the covariance E[x xᵀ] − E[x] E[x]ᵀ, (n, n)."""
        return self.second - torch.outer(self.mean, self.mean)

    def shifted(self, offset: Tensor) -> Moment:
        """Return the moment of x − offset."""
        cross = torch.outer(self.mean, offset)
        return Moment(
            self.second - cross - cross.T + torch.outer(offset, offset), self.mean - offset, self.tokens
        )

    def double(self) -> Moment:
        """Return the moment in float64, for roots and solves."""
        return Moment(self.second.double(), self.mean.double(), self.tokens)


class MomentSum:
    """Running sums for a ``Moment``: products in the precision of the inputs, summed in float32."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._second = torch.zeros(width, width, device=device)
        self._first = torch.zeros(width, device=device)
        self._tokens = 0
        self._weight = 0  # tokens, with the first ones weighted

    def add(self, x: Tensor, first_token: int = 1) -> None:
        """Add the tokens of x (..., tokens, width); the first of each block has weight ``first_token``."""
        rows = x.reshape(-1, x.shape[-1])
        self._tokens += rows.shape[0]
        self._count(rows, 1)
        if first_token > 1:
            self._count(x[..., 0, :].reshape(-1, x.shape[-1]), first_token - 1)

    def _count(self, rows: Tensor, times: int) -> None:
        add_gram(self._second, rows, times)
        self._first += times * rows.sum(dim=0, dtype=torch.float32)
        self._weight += times * rows.shape[0]

    def reduce(self, processes: Processes) -> None:
        """Add the sums of the other processes."""
        processes.sum(self._second, self._first)
        self._tokens, self._weight = processes.total(self._tokens), processes.total(self._weight)

    def moment(self) -> Moment:
        """Return the means so far."""
        return Moment(mirrored(self._second / self._weight), self._first / self._weight, self._tokens)


class Moments(Statistic):
    """The moment at the site of each target; targets of one site share it."""

    name = "moments"

    def __init__(self, layer: Layer, targets: Iterable[str]) -> None:
        super().__init__(layer, targets)
        family, device = layer.architecture.family, layer.device
        used = {site_of(family, target) for target in self.targets}
        self._paths = {site: path for site, path in family.sites.items() if site in used}
        widths = {site: layer.architecture.site_width(site) for site in self._paths}
        self._sums = {site: MomentSum(width, device) for site, width in widths.items()}

    @property
    def watched(self) -> Collection[str]:
        return self._paths.values()

    def add(self, calls: Mapping[str, Call]) -> None:
        for site, path in self._paths.items():
            self._sums[site].add(calls[path].input.to(self.layer.dtype), self.layer.first_token)

    def reduce(self, processes: Processes) -> None:
        for total in self._sums.values():
            total.reduce(processes)

    def result(self) -> dict[str, Moment]:
        moments = {site: total.moment() for site, total in self._sums.items()}
        for site, moment in moments.items():
            if not bool(moment.second.diagonal().isfinite().all()):
                raise UserError(
                    f"layer {self.index}: activations at {site}, the input of {self._paths[site]}, or their squares "
                    "are NaN or inf"
                )
        family = self.layer.architecture.family
        return {target: moments[site_of(family, target)] for target in self.targets}


def add_gram(total: Tensor, rows: Tensor, factor: Tensor | int = 1) -> None:
    """Add ``factor`` · rowsᵀ rows to the upper triangle of a float32 total (n, n), for rows (tokens, n).

    Blocks below the diagonal stay as they are until ``mirrored``. For wide rows this saves almost half the work.
    """
    for start in range(0, rows.shape[1], GRAM_BLOCK):
        end = start + GRAM_BLOCK
        block = product(rows[:, start:end], rows[:, start:])
        total[start:end, start:] += block if isinstance(factor, int) and factor == 1 else block.mul_(factor)


def mirrored(gram: Tensor) -> Tensor:
    """Fill, in place, the lower triangle of a matrix (n, n) that ``add_gram`` summed, and return the matrix."""
    for start in range(GRAM_BLOCK, gram.shape[0], GRAM_BLOCK):
        gram[start : start + GRAM_BLOCK, :start] = gram[:start, start : start + GRAM_BLOCK].T
    return gram


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return leftᵀ right, summed in float32, for left (tokens, m) and right (tokens, n).

    A GPU multiplies bfloat16 and float16 directly. A float32 ``left`` is then split into a high and a low part of that
    precision.
    """
    low = right.dtype in (torch.bfloat16, torch.float16)
    if not (left.is_cuda and low):
        return left.float().T @ right.float()
    high = left.to(right.dtype)
    total = torch.mm(high.T, right, out_dtype=torch.float32)
    if left.dtype == torch.float32:
        total += torch.mm((left - high).to(right.dtype).T, right, out_dtype=torch.float32)
    return total
