"""Run linear maps of one input as one product; their parameters become views into the merged matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrc.modules.low_rank import Factor, LowRankLinear


class MergedProjections:
    """Hold merged projections of one input: one product for dense weights and first factors, then the second factors.

    The members' parameters become views into the merged matrices, so that no weight is stored twice, and state dicts
    and optimizer steps work as before. Neighbours whose second factors have one shape run as one batched
    product. Callers must run the members one by one unless ``holds``.
    """

    def __init__(self, parent: nn.Module, names: Sequence[str]) -> None:
        members = [getattr(parent, name) for name in names]
        self.names = tuple(names)
        firsts = [_first(member) for member in members]
        self._places = [(parent, name, member) for name, member in zip(names, members, strict=True)]
        self._places += [
            (m, name, getattr(m, name)) for m in members if isinstance(m, LowRankLinear) for name in "AB"
        ]
        self._weight = _tie([linear.weight for linear in firsts])
        self._bias = _tie_biases(firsts)
        self._runs = [_Run([*run]) for _, run in groupby(members, _output_shape)]
        self._widths = [sum(_first(m).out_features for m in run.members) for run in self._runs]
        self._addresses = [
            (parameter, parameter.data_ptr())
            for _, _, module in self._places
            for parameter in module.parameters(recurse=False)
        ]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Return the members' outputs for ``x`` (..., in)."""
        inner = F.linear(x, self._weight, self._bias)
        parts = inner.split(self._widths, dim=-1)
        return [y for run, part in zip(self._runs, parts, strict=True) for y in run(part)]

    def holds(self) -> bool:
        """Tell whether the merged product is valid: no gradients, adapter, hook or new weight since the merge."""
        return not torch.is_grad_enabled() and self._in_place() and self._tied()

    def _in_place(self) -> bool:
        return all(
            owner._modules.get(name) is module and not module._forward_hooks and not module._forward_pre_hooks
            for owner, name, module in self._places
        )

    @torch.compiler.assume_constant_result
    def _tied(self) -> bool:
        return all(parameter.data_ptr() == address for parameter, address in self._addresses)

    def __reduce__(self) -> Any:
        """Copy and pickle as None: the parameters of a copy have their own memory."""
        return type(None), ()


class MergesProjections(nn.Module):
    """A module whose projections may be merged; moving it to another device or dtype merges them again."""

    merged: MergedProjections | None = None

    def merge(self, names: Sequence[str]) -> bool:
        """Merge projections if possible; tell whether they were merged."""
        self.merged = MergedProjections(self, names) if mergeable(self, names) else None
        return self.merged is not None

    def project(self, names: Sequence[str], x: Tensor) -> list[Tensor]:
        """Return the outputs of projections of ``x``, by one product if they are merged."""
        if self.merged is not None and self.merged.holds():
            return self.merged(x)
        return [getattr(self, name)(x) for name in names]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.merged is not None:
            self.merge(self.merged.names)
        return self


class _Run:
    """Hold neighbours that run together: dense ones, or low-rank ones whose second factors have one shape."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        self.members = members
        self._seconds = [member.B for member in members if isinstance(member, LowRankLinear)]
        self._weight = None
        if len(self._seconds) > 1:
            out, rank = self._seconds[0].weight.shape
            self._weight = _tie([linear.weight for linear in self._seconds]).view(-1, out, rank)

    def __call__(self, inner: Tensor) -> Sequence[Tensor]:
        if not self._seconds:
            return inner.split([_first(member).out_features for member in self.members], dim=-1)
        if self._weight is None:
            return [self._seconds[0](inner)]
        rows, (count, _, rank) = inner.shape[:-1], self._weight.shape
        stacked = inner.flatten(0, -2).unflatten(-1, (count, rank)).transpose(0, 1)  # (member, tokens, rank)
        found = torch.bmm(stacked, self._weight.transpose(1, 2)).unflatten(1, rows).unbind(0)
        return [
            y if linear.bias is None else y + linear.bias
            for y, linear in zip(found, self._seconds, strict=True)
        ]


def _output_shape(member: nn.Module) -> tuple[int, int] | None:
    """Return the shape of a member's second factor, or None for a dense one."""
    return (member.out_features, member.rank) if isinstance(member, LowRankLinear) else None


def _first(member: Any) -> Any:
    """Return the linear map of a member that reads the input."""
    return member.A if isinstance(member, LowRankLinear) else member


def mergeable(parent: nn.Module, names: Sequence[str]) -> bool:
    """Tell whether projections are dense or low-rank, on one device, of one dtype and without hooks."""
    linears = []
    for name in names:
        member = getattr(parent, name)
        linears += [member.A, member.B] if type(member) is LowRankLinear else [member]
        if member._forward_hooks or member._forward_pre_hooks or hasattr(member, "_hf_hook"):
            return False
    if len(names) < 2 or any(
        type(linear) not in (nn.Linear, Factor) or hasattr(linear, "_hf_hook") for linear in linears
    ):
        return False
    weights = [linear.weight for linear in linears]
    alike = len({(weight.device, weight.dtype) for weight in weights}) == 1
    return alike and not weights[0].is_meta


def _tie(parameters: Sequence[Tensor]) -> Tensor:
    """Join parameters of equal width into one matrix and make each a view of its rows."""
    whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, rows in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        parameter.data = rows
    return whole


def _tie_biases(firsts: Sequence[nn.Linear]) -> Tensor | None:
    """Join the biases into one vector, with zeros for members without one; None if there is no bias."""
    if all(linear.bias is None for linear in firsts):
        return None
    whole = firsts[0].weight.new_zeros(sum(linear.out_features for linear in firsts))
    for linear, part in zip(firsts, whole.split([f.out_features for f in firsts]), strict=True):
        if linear.bias is not None:
            part.copy_(linear.bias.detach())
            linear.bias.data = part
    return whole
