"""Refit output projections to the original residual stream by ridge regression toward the method's solution.

The ridge is chosen on held-out calibration blocks, which no moment, gradient or refit has seen. A refit that does not
lower the error on them is not applied. For wide outputs ridges are compared in random directions, which keep the
expected squared error (Johnson and Lindenstrauss) and make a trial cost little more than its Cholesky factor.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional

from lrc.compression.assemble import ReducedLayer
from lrc.errors import UserError
from lrc.families import Architecture, Family
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
SHARE = 16  # of the blocks, one is held out
DIRECTIONS = 256
STEPS = (1, 0.5, 0.25, 0)  # shares of a change that is fitted through a norm
_LEAST_GAIN = 0.1  # of the root mean square of a norm's gains
_SEED = 0


def held_out_mask(count: int) -> Tensor:
    """Return the mask (count,) of calibration blocks held out of all fits, to judge them and to fit the logit scale.

    One block in ``SHARE``, at least one; none if there is only one block.
    """
    held = torch.zeros(count, dtype=torch.bool)
    if count > 1:
        # The place within each share varies, as blocks of several texts are interleaved.
        held[[SHARE * i + i % SHARE for i in range(max(count // SHARE, 1))]] = True
    return held


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


@dataclass(frozen=True)
class StreamNorms:
    """Count tokens with less than half or more than twice the original's norm in the residual stream after a layer.

    A few tokens, often the first of a text, have norms far above all others, and later layers attend to them (massive
    activations, arXiv:2402.17762). So first tokens of a block also count apart. The tokens are those of the held-out
    blocks; of all blocks if there is only one.
    """

    layer: int
    tokens: int
    changed: int
    first_tokens: int
    changed_first_tokens: int

    @property
    def share(self) -> float:
        """The share of tokens that changed, or that of first tokens if it is larger and more than one has changed."""
        first = self.changed_first_tokens / self.first_tokens if self.changed_first_tokens > 1 else 0.0
        return max(self.changed / self.tokens, first)

    @property
    def text(self) -> str:
        """The counts in words."""
        return (
            f"after layer {self.layer}, {self.changed:,} of {self.tokens:,} tokens ({self.changed_first_tokens:,} of "
            f"{self.first_tokens:,} first tokens of a block) have less than half or more than twice the original's "
            "norm in the residual stream"
        )


# Read back from JSON values.
REFITS = TypeAdapter(list[RefitRecord])
NORMS = TypeAdapter(list[StreamNorms])
_MANY = 0.05  # tokens


def norm_warnings(norms: Sequence[StreamNorms]) -> list[str]:
    """Return a warning about the first layer after which the norms of more than one token in twenty have changed."""
    start = next((each for each in norms if each.share > _MANY), None)
    if start is None:
        return []
    return [
        f"{start.text}, so that later layers may attend to other tokens; keep more in this layer or before it"
    ]


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
        self._attention: tuple[nn.Module, list[Tensor]] | None = None

    def run(
        self, roles: Sequence[str], middles: Sequence[Tensor], compressed: list[Tensor]
    ) -> tuple[list[RefitRecord], StreamNorms]:
        """Refit ``roles`` and run the ``compressed`` stream through the layer, in place.

        Attention is refitted to ``middles``, the original stream between attention and MLP. The MLP is refitted to the
        original layer's output. Also counts the tokens whose norms change.
        """
        paths, records = {role: self._linear(role) for role in roles}, list[RefitRecord]()
        for half in self._stream.reader.family.halves:
            if path := paths.get(half.output):
                goals = [batch.hidden for batch in self._batches] if half.name == "mlp" else middles
                records.append(self._refit(half, path, goals, compressed))
        module, processes = self._reduced.module, self._stream.processes
        some = processes.total(sum(self._held)) > 0
        # On the device, so that no batch waits for a count.
        counts = torch.zeros(4, dtype=torch.int64, device=self._stream.device)
        with self._stream.checked(module, self._index):
            for i, (batch, hidden, attention_output, _) in enumerate(self._states(compressed)):
                out = self._stream.run(module, self._index, batch, hidden, attention_output=attention_output)
                if self._held[i] or not some:
                    counts += _changed_norms(out, self._stream.fetch(batch.hidden))
                compressed[i] = self._stream.states.keep(out)
        return records, StreamNorms(self._index, *processes.total(counts.cpu()).tolist())

    def _refit(
        self, half: Half, path: str, goals: Sequence[Tensor], compressed: Sequence[Tensor]
    ) -> RefitRecord:
        """Refit the linear at ``path``, the output of ``half``, so that the stream reaches ``goals``."""
        module, read, architecture = self._reduced.module, list[Tensor](), self._stream.reader.architecture
        linear, added = module.get_submodule(path), _Added(module, half, architecture)
        out, width = self._reduced.state[f"{path}.weight"].shape
        sums = RefitSum(width, out, self._stream.device)
        for i, (x, before, goal) in enumerate(self._read(half, path, goals, compressed)):
            output = self._apply(linear, x)
            sums.add(added.scaled(x, output), goal, before + added.by(output), self._held[i])
            if half.name == "attention":
                read.append(self._stream.states.keep(x))
        # Replace the linear in the layer's tensors and in its module.
        reduced, processes = self._reduced, self._stream.processes
        weight, bias = f"{path}.weight", f"{path}.bias"
        sums.reduce(processes)
        start = Affine(reduced.state[weight], reduced.state.get(bias))
        # On one process, so that all have the same bits.
        solve = partial(sums.solve, layer=self._index, role=half.output, gain=added.gain, biased=added.linear)
        ((fitted, record),) = processes.spread([start], solve)
        if record.applied and not added.linear:
            inputs = self._read(half, path, goals, compressed)
            fitted, record = self._best_step(added, linear, start, fitted, record, inputs)
        errors = [record.error, *([record.held_out] if record.held_out else [])]
        if not all(math.isfinite(each) for error in errors for each in (error.before, error.after)):
            raise UserError(f"layer {self._index}: the error of the stream after {half.output} is NaN or inf")
        if record.applied:
            reduced.state[weight] = fitted.weight.to(start.weight.dtype)
            if fitted.bias is not None:
                reduced.state[bias] = fitted.bias.to(reduced.state[bias].dtype)
            self._stream.filled(module, reduced.state)
        if read:
            self._attention = linear, read
        return record

    def _read(
        self, half: Half, path: str, goals: Sequence[Tensor], compressed: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield by batch what the linear at ``path`` reads, the stream that its output is added to, and the goal."""
        module, architecture = self._reduced.module, self._stream.reader.architecture
        watched = {"stream": half.entry, "x": path}
        if half.name == "mlp" and architecture.parallel:
            watched["attention"] = architecture.family.attention
        for batch, hidden, attention_output, (goal,) in self._states(compressed, goals):
            with observe(module, watched, stop_at="x") as seen:
                self._stream.run(module, self._index, batch, hidden, attention_output=attention_output)
            before = seen["stream"].input
            if "attention" in seen:
                before = before + seen["attention"].output[0]
            yield seen["x"].input.to(self._stream.dtype), before, goal

    @torch.no_grad()
    def _best_step(
        self,
        added: _Added,
        linear: nn.Module,
        start: Affine,
        fitted: Affine,
        record: RefitRecord,
        inputs: Iterable[tuple[Tensor, Tensor, Tensor]],
    ) -> tuple[Affine, RefitRecord]:
        """Return the step of ``STEPS`` from ``start`` to ``fitted`` with the least error on held-out blocks.

        Its errors are those of the stream, with the norm of the refitted output; ``applied`` is decided by them.
        """
        device, processes = self._stream.device, self._stream.processes
        change = (fitted.weight - start.weight.double()).to(self._stream.dtype)
        # Of fitted and held-out blocks: the squared error of each step, and the squared size of the stream.
        sums = torch.zeros(2, len(STEPS) + 1, dtype=torch.float64, device=device)
        for held, (x, before, goal) in zip(self._held, inputs, strict=True):
            output, more = self._apply(linear, x), functional.linear(x, change)
            streams = [before + added.by(output + step * more) for step in STEPS]
            sizes = [(goal - stream).square() for stream in streams] + [goal.square()]
            sums[int(held)] += torch.stack([each.double().sum() for each in sizes])
        found = processes.total(sums.cpu())
        (*errors, size), (*own, own_size) = found[1].tolist(), found[0].tolist()
        if record.held_out is None:
            errors = own
        best = min(range(len(STEPS)), key=errors.__getitem__)
        step, none = STEPS[best], STEPS.index(0)
        error = StreamError(own[none] / own_size, own[best] / own_size)
        if record.held_out is not None:
            held_out = StreamError(errors[none] / size, errors[best] / size)
            record = replace(record, held_out=held_out)
        weight = start.weight.double() + step * (fitted.weight - start.weight.double())
        return Affine(weight, start.bias), replace(record, error=error, applied=step > 0)

    def _states(
        self, compressed: Sequence[Tensor], *more: Iterable[Tensor]
    ) -> Iterator[tuple[Batch, Tensor, Tensor | None, tuple[Tensor, ...]]]:
        """Yield each batch, its compressed stream, its attention output if cached, and its entries in ``more``."""
        linear, read = self._attention or (None, None)
        lists = [compressed, *([read] if read else []), *more]
        for batch, (hidden, *others) in zip(self._batches, self._stream.prefetched(*lists), strict=True):
            attention_output = self._apply(linear, others.pop(0)) if linear is not None else None
            yield batch, hidden, attention_output, tuple(others)

    @torch.no_grad()
    def _apply(self, linear: nn.Module, x: Tensor) -> Tensor:
        with self._stream.precision():
            return linear(x)

    def _linear(self, role: str) -> str | None:
        """Return the path of the last linear in a role's module, or None if it does not end in one."""
        path = self._reduced.paths[role]
        module = self._reduced.module.get_submodule(path)
        if not isinstance(module, StructuredLinear):
            return path
        last = module.output_linear
        return next((f"{path}.{name}" for name, child in module.named_children() if child is last), None)


class _Added:
    """What a layer half adds to the residual stream: its last projection's output, after the half's norm or factor.

    A norm g y / rms(y) is linearised: rms(y) is that of the output before the refit. ``gain`` (out,): g, or the factor;
    None if it is 1. ``linear``: whether there is no norm.
    """

    def __init__(self, layer: nn.Module, half: Half, architecture: Architecture) -> None:
        family, factor = architecture.family, architecture.residual_factor
        self._norm: Any = layer.get_submodule(half.post_norm) if half.post_norm else None
        self._factor, self._epsilon = factor, family.norm_epsilon
        self.linear = self._norm is None
        self.gain: Tensor | None = None
        if self._norm is not None:
            self.gain = factor * (family.norm_offset + self._norm.weight.double())
        elif factor != 1:
            self.gain = torch.tensor([factor], dtype=torch.float64)

    @torch.no_grad()
    def by(self, output: Tensor) -> Tensor:
        """Return what an output (..., out) of the projection adds to the stream."""
        normed = output if self._norm is None else self._norm(output)
        return normed if self._factor == 1 else self._factor * normed

    def scaled(self, x: Tensor, output: Tensor) -> Tensor:
        """Return inputs x (..., width) of the projection divided by the rms of its output, if that is normed."""
        if self._norm is None:
            return x
        assert self._epsilon is not None, "a norm after a module is a root mean square"
        square = output.float().square().mean(dim=-1, keepdim=True) + getattr(self._norm, self._epsilon)
        return (x.float() * square.rsqrt()).to(x.dtype)


def _changed_norms(stream: Tensor, original: Tensor) -> Tensor:
    """Count in streams (blocks, tokens, width) the tokens and those with a changed norm, then both of first tokens."""
    norms, before = (each.float().norm(dim=-1) for each in (stream, original))
    changed = (norms < before / 2) | (norms > 2 * before)
    each = torch.ones_like(changed)
    return torch.stack([part.sum() for part in (each, changed, each[:, 0], changed[:, 0])])


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
