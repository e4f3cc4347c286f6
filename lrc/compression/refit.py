"""Refit output projections to the original residual stream by ridge regression toward the method's solution.

The ridge is chosen on held-out calibration blocks; the final fit uses all blocks. The moments and the refits of earlier
layers have seen the held-out blocks too. For wide outputs ridges are compared in random directions, which keep the
expected squared error (Johnson and Lindenstrauss) and make a trial cost little more than its Cholesky factor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compression.assemble import ReducedLayer
from lrc.families import Family
from lrc.families.family import Half
from lrc.maths.linalg import damped_cholesky, data_error
from lrc.methods.contract import Affine
from lrc.modules import StructuredLinear
from lrc.moments.moment import add_gram, mirrored, product
from lrc.moments.observe import observe
from lrc.run.processes import Processes
from lrc.walk.stream import Batch, ModelStream

RIDGE = 0.1  # without held-out blocks
RIDGES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)  # the strongest first, as ties take the first
EIGHT = 8
DIRECTIONS = 256
_SEED = 0


def held_out_blocks(count: int) -> Tensor:
    """Return the mask (count,) of calibration blocks held out to choose ridges and the logit scale.

    One block in eight, at least one; none if there is only one block.
    """
    # Its place within each eight varies, as blocks of several texts are interleaved.
    held = torch.zeros(count, dtype=torch.bool)
    if count > 1:
        held[[EIGHT * i + 3 * i % EIGHT for i in range(max(count // EIGHT, 1))]] = True
    return held


@dataclass(frozen=True)
class StreamError:
    """E‖x − x̃‖² / E‖x‖² of the compressed residual stream x̃ and the original's x, before and after a refit."""

    before: float
    after: float


@dataclass(frozen=True)
class RefitRecord:
    """What is kept of the refit of a layer's ``role``.

    ``ridge`` is a fraction of the mean diagonal; ``raised`` what the solve took instead where that was not enough.
    ``error`` is that of all blocks and the final fit; ``held_out`` that of the blocks which chose the ridge, by the fit
    without them, None where there was one block and the ridge is a fixed one.
    """

    layer: int
    role: str
    ridge: float
    raised: float | None
    error: StreamError
    held_out: StreamError | None

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> RefitRecord:
        """Return the record that ``as_dict`` was called on."""
        held = record["held_out"]
        errors = {"error": StreamError(**record["error"]), "held_out": held and StreamError(**held)}
        return cls(**{**record, **errors})


def refit_warnings(refits: Sequence[RefitRecord]) -> list[str]:
    """Return a warning if most refits of a run gain nothing on their held-out blocks."""
    chosen = [refit.held_out for refit in refits if refit.held_out is not None]
    worse = [error for error in chosen if error.after >= error.before]
    if 2 * len(worse) <= len(chosen):
        return []
    return [
        f"{len(worse)} of {len(chosen)} residual refits do not lower the error on held-out calibration blocks; use "
        "more samples"
    ]


@dataclass(frozen=True)
class Refit:
    """A fitted projection, and the fields of its ``RefitRecord``."""

    solution: Affine
    ridge: float
    raised: float | None
    error: StreamError
    held_out: StreamError | None

    def record(self, layer: int, role: str) -> RefitRecord:
        """Return the record of this refit."""
        return RefitRecord(layer, role, self.ridge, self.raised, self.error, self.held_out)


def closing_roles(family: Family, targets: Collection[str]) -> list[str]:
    """Return the output projections (``o``, ``down``) of the layer halves that contain one of ``targets``."""
    return [half.output for half in family.halves if half.targets & set(targets)]


class LayerRefit:
    """Refit the output projections of one reduced layer to the original residual stream."""

    def __init__(
        self,
        stream: ModelStream,
        index: int,
        reduced: ReducedLayer,
        batches: Sequence[Batch],
        held: Sequence[bool],
    ) -> None:
        self._stream, self._index, self._reduced = stream, index, reduced
        self._batches, self._held = batches, held
        # Attention's output projection and its inputs by batch. The refit does not change them: attention runs once.
        self._attended: tuple[nn.Module, list[Tensor]] | None = None

    def run(
        self, roles: Sequence[str], middles: Sequence[Tensor], compressed: list[Tensor]
    ) -> list[RefitRecord]:
        """Refit ``roles`` and run the ``compressed`` stream through the layer, in place.

        Attention is refitted to ``middles``, the original stream between attention and MLP. The MLP is refitted to the
        original layer's output.
        """
        paths, records = {role: self._linear(role) for role in roles}, list[RefitRecord]()
        for half in self._stream.reader.family.halves:
            if path := paths.get(half.output):
                last = half.name == "mlp"
                goals = (batch.hidden for batch in self._batches) if last else middles
                records.append(self._refit(half, path, goals, compressed))
        for i, (batch, hidden, attention_output, _) in enumerate(self._states(compressed)):
            out = self._stream.run(
                self._reduced.module, self._index, batch, hidden, attention_output=attention_output
            )
            compressed[i] = self._stream.states.keep(out)
        return records

    def _refit(
        self, half: Half, path: str, goals: Iterable[Tensor], compressed: Sequence[Tensor]
    ) -> RefitRecord:
        """Refit the linear at ``path``, the output of ``half``, so that the stream reaches ``goals``."""
        module, read = self._reduced.module, list[Tensor]()
        linear = module.get_submodule(path)
        out, width = self._reduced.state[f"{path}.weight"].shape
        sums = RefitSum(width, out, self._stream.device)
        for i, (batch, hidden, attention_output, (goal,)) in enumerate(self._states(compressed, goals)):
            with observe(module, {"stream": half.norm, "x": path}, stop_at="x") as seen:
                self._stream.run(module, self._index, batch, hidden, attention_output=attention_output)
            x, before = self._stream.cast(seen["x"].input), seen["stream"].input
            sums.add(x, goal, before + self._apply(linear, x), self._held[i])
            if half.name == "attention":
                read.append(self._stream.states.keep(x))
        refit = self._replace(path, sums)
        if read:
            self._attended = linear, read
        return refit.record(self._index, half.output)

    def _states(
        self, compressed: Sequence[Tensor], *more: Iterable[Tensor]
    ) -> Iterator[tuple[Batch, Tensor, Tensor | None, tuple[Tensor, ...]]]:
        """Yield each batch, its compressed stream, its attention output if cached, and its entries in ``more``."""
        linear, read = self._attended or (None, None)
        lists = [compressed, *([read] if read else []), *more]
        for batch, (hidden, *others) in zip(self._batches, self._stream.prefetched(*lists), strict=True):
            attention_output = self._apply(linear, others.pop(0)) if linear is not None else None
            yield batch, hidden, attention_output, tuple(others)

    @torch.no_grad()
    def _apply(self, linear: nn.Module, x: Tensor) -> Tensor:
        with self._stream.precision():
            return linear(x)

    def _replace(self, path: str, sums: RefitSum) -> Refit:
        """Replace the linear at ``path`` by its refit, in the layer's tensors and in its module."""
        reduced, processes, dtype = self._reduced, self._stream.processes, self._stream.reader.dtype
        weight, bias = f"{path}.weight", f"{path}.bias"
        sums.reduce(processes)
        start = Affine(reduced.state[weight], reduced.state.get(bias))
        (refit,) = processes.spread([start], sums.solve)  # on one process, so that all have the same bits
        fitted = refit.solution
        reduced.state[weight] = fitted.weight.to(dtype)
        if fitted.bias is not None:
            reduced.state[bias] = fitted.bias.to(dtype)
        self._stream.filled(reduced.module, reduced.state)
        return refit

    def _linear(self, role: str) -> str | None:
        """Return the path of the last linear in a role's module, or None if it does not end in one."""
        path = self._reduced.paths[role]
        module = self._reduced.module.get_submodule(path)
        if not isinstance(module, StructuredLinear):
            return path
        last = module.output_linear
        return next((f"{path}.{name}" for name, child in module.named_children() if child is last), None)


def directions(out: int, device: torch.device) -> Tensor | None:
    """Return fixed normal directions (``DIRECTIONS``, out) in float64, or None if ``out`` is no larger than that."""
    if out <= DIRECTIONS:
        return None
    generator = torch.Generator(device).manual_seed(_SEED)
    return torch.randn(DIRECTIONS, out, generator=generator, dtype=torch.float64, device=device)


class RefitSum:
    """Sums over tokens for one refit: inputs of the projection, and the residual that its output leaves."""

    def __init__(self, width: int, out: int, device: torch.device) -> None:
        self._fitted, self._held = (_Sums.zero(width, out, device) for _ in range(2))

    def add(self, x: Tensor, goal: Tensor, reached: Tensor, held: bool) -> None:
        """Add inputs x (blocks, tokens, width), the original stream ``goal`` and the compressed one ``reached``.

        The streams are (blocks, tokens, out) in float32. ``reached`` is that of the unfitted projection. ``held`` keeps
        the tokens out of the fit that chooses the ridge.
        """
        (self._held if held else self._fitted).add(x, goal, reached)

    def reduce(self, processes: Processes) -> None:
        """Add the sums of the other processes."""
        for sums in (self._fitted, self._held):
            sums.reduce(processes)

    def solve(self, start: Affine) -> Refit:
        """Return the W, b minimising E‖t − W x − b‖² + λ‖W − W₀‖²_F, where ``start`` is (W₀, b₀).

        The target t has t − W₀ x − b₀ = ``goal`` − ``reached``. λ is the ridge times the mean diagonal of E[x xᵀ],
        centred if there is a bias. The ridge is the one of ``RIDGES`` with the least error on the held-out blocks when
        fitted without them.
        """
        biased = start.bias is not None
        ridge, held_out = RIDGE, None
        if self._held.tokens:
            fitted, held = self._fitted.means(), self._held.means()
            some = directions(len(held.r), held.r.device)
            fitted_in, held_in = fitted.along(some), held.along(some)
            changes = {each: held_in.gained(fitted_in.change(each, biased)[0]) for each in RIDGES}
            ridge = max(changes, key=changes.__getitem__)
            error = held.error(fitted.change(ridge, biased)[0])
            held_out = StreamError(held.missing / held.size, error / held.size)
            del fitted, held, fitted_in, held_in
        every = self._fitted.plus(self._held).means()
        change, damping = every.change(ridge, biased)
        bias = None if start.bias is None or change.bias is None else start.bias.double() + change.bias
        return Refit(
            Affine(start.weight.double() + change.weight, bias),
            ridge,
            None if damping == ridge else damping,
            StreamError(every.missing / every.size, every.error(change) / every.size),
            held_out,
        )


@dataclass
class _Sums:
    """Sums of x xᵀ, r xᵀ, x, r (float32), ‖r‖² and ‖stream‖² (float64); r is the residual."""

    gram: Tensor
    cross: Tensor
    x: Tensor
    r: Tensor
    missing: Tensor
    size: Tensor
    tokens: int

    @classmethod
    def zero(cls, width: int, out: int, device: torch.device) -> _Sums:
        shapes = ((width, width), (out, width), (width,), (out,))
        gram, cross, x, r = (torch.zeros(shape, device=device) for shape in shapes)
        missing, size = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        return cls(gram, cross, x, r, missing, size, 0)

    def add(self, x: Tensor, goal: Tensor, reached: Tensor) -> None:
        rows, missing = x.flatten(0, -2), (goal - reached).flatten(0, -2)
        add_gram(self.gram, rows)
        self.cross += product(missing, rows)
        self.x += rows.sum(dim=0, dtype=torch.float32)
        self.r += missing.sum(dim=0)
        self.missing += missing.square().sum(dim=0).double().sum()
        self.size += goal.square().sum(dim=(0, 1)).double().sum()
        self.tokens += rows.shape[0]

    def reduce(self, processes: Processes) -> None:
        processes.sum(self.gram, self.cross, self.x, self.r, self.missing, self.size)
        self.tokens = processes.total(self.tokens)

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(
            self.gram + other.gram,
            self.cross + other.cross,
            self.x + other.x,
            self.r + other.r,
            self.missing + other.missing,
            self.size + other.size,
            self.tokens + other.tokens,
        )

    def means(self) -> _Means:
        return _Means(
            mirrored(self.gram / self.tokens),
            *(sums.double() / self.tokens for sums in (self.cross, self.x, self.r)),
            missing=float(self.missing) / self.tokens,
            size=float(self.size) / self.tokens,
        )


@dataclass(frozen=True)
class _Means:
    """Means over tokens: E[x xᵀ] in float32; E[r xᵀ], E[x], E[r], E‖r‖² and E‖stream‖² in float64."""

    gram: Tensor
    cross: Tensor
    x: Tensor
    r: Tensor
    missing: float
    size: float

    def along(self, directions: Tensor | None) -> _Means:
        """Return the means with r projected on directions (k, out); ``missing`` stays, so only compare gains."""
        if directions is None:
            return self
        return replace(self, cross=directions @ self.cross, r=directions @ self.r)

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

    def error(self, change: Affine) -> float:
        """Return E‖r − D x − d‖²."""
        # The difference of float32 sums may round below zero.
        return max(self.missing - self.gained(change), 0.0)
