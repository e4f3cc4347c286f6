"""Refit the output projections of a reduced layer to the original residual stream."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrc.compression.assemble import ReducedLayer
from lrc.compression.norms import StreamNorms, changed_norms
from lrc.compression.ridge import RefitRecord, RefitSum, StreamError
from lrc.errors import UserError
from lrc.families import Architecture, Family
from lrc.families.family import Half
from lrc.methods.contract import Affine
from lrc.modules import StructuredLinear
from lrc.moments.observe import observe
from lrc.walk.stream import Batch, ModelStream

SHARE = 16  # of the blocks, one is held out
STEPS = (1, 0.5, 0.25, 0)  # shares of a change that is fitted through a norm


def held_out_mask(count: int) -> Tensor:
    """Return the mask (count,) of calibration blocks held out of all fits, to judge them and to fit the logit scale.

    One block in ``SHARE``, at least one; none if there is only one block.
    """
    held = torch.zeros(count, dtype=torch.bool)
    if count > 1:
        # The place within each share varies, as blocks of several texts are interleaved.
        held[[SHARE * i + i % SHARE for i in range(max(count // SHARE, 1))]] = True
    return held


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
                    counts += changed_norms(out, self._stream.fetch(batch.hidden))
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
