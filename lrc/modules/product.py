"""The weight of a factorized module as one matrix, computed only when it is used: adapters read and write it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_RESOLVED = 1e-6  # of the norm of a float32 matrix: above the rounding of sums over it
_FIRST = 8  # a rank to try


class Product(Tensor):
    """Hold no values: any operation gets the matrix that ``module.whole()`` computes.

    ``data``, which adapters change to merge themselves, is that matrix in float32; ``module.merge`` takes a new one.
    Raises UserError for any other change in place.
    """

    module: Any

    @staticmethod
    def __new__(cls, module: Any, shape: tuple[int, int], like: Tensor) -> Product:
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
        made.module = module
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise args[0].module.refusal()
        args, kwargs = tree_map_only(cls, lambda held: held.module.whole(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Product({tuple(self.shape)}, {self.dtype})"

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.module.whole(torch.float32)

    @data.setter
    def data(self, value: Tensor) -> None:
        self.module.merge(value)


def extended(b: Tensor, a: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return B and A with columns and rows added, so that B A is ``value``; None if they become larger than needed.

    The change has the least rank that holds it to the precision of the factors. A range finder with one power iteration
    finds it (arXiv:0909.4061, algorithm 4.4).
    """
    change = value.float() - b.float() @ a.float()
    norm, most = change.norm(), min(value.shape) - a.shape[0]
    small = 8 * torch.finfo(b.dtype).eps * norm + _RESOLVED * value.float().norm()
    if norm <= small:
        return b, a
    generator, size = torch.Generator(value.device).manual_seed(0), _FIRST
    while True:
        size = min(size, *value.shape)
        drawn = torch.randn(value.shape[1], size, device=value.device, generator=generator)
        columns, _ = torch.linalg.qr(change @ drawn)
        columns, _ = torch.linalg.qr(change @ (change.T @ columns))
        rows = columns.T @ change
        if (change - columns @ rows).norm() <= small:
            break
        if size > most:
            return None
        size *= 2
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    kept = int((s > small / size**0.5).sum())
    if kept > most:
        return None
    root = s[:kept].sqrt()
    more = (columns @ u[:, :kept] * root).to(b.dtype), (root[:, None] * v[:kept]).to(a.dtype)
    return torch.cat([b, more[0]], dim=1), torch.cat([a, more[1]])
