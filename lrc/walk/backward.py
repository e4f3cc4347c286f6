"""Collect gradients of the loss layer by layer: one forward pass, then a backward pass over the layers.

Labels are drawn from the model's own distribution at every position (the true Fisher information). Only activations
are differentiated. The device holds one layer, its sums and one batch; layer inputs and moments are offloaded as the
stream's states are. All layer inputs are kept if they fit in ``_KEEP_ALL`` bytes. Else every ⌈√layers⌉-th is kept and
the others are computed again, which costs one more forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lrc.errors import UserError
from lrc.moments.gradient import GradientMoment, GradientSum, GradientTargets
from lrc.moments.observe import observe
from lrc.plan.resolved import LayerPlan
from lrc.plan.schema import Calibration
from lrc.run.settings import Progress, unseen
from lrc.text.blocks import batched, gradient_blocks, seed_for
from lrc.walk.needs import gradients_needed
from lrc.walk.stream import Batch, ModelStream

_KEEP_ALL = 2**33
_LOGITS = 2**24  # elements
_PEAK = 4  # gradients are scaled to at most 2**_PEAK before a backward pass
_LARGEST_SCALE = 60  # the square of 2**_LARGEST_SCALE fits in float32


def stride(layers: int, state_bytes: int) -> int:
    """Return how many layers lie from one kept input to the next, for inputs of ``state_bytes`` each."""
    return 1 if layers * state_bytes <= _KEEP_ALL else math.ceil(layers**0.5)


def states_held(layers: int, every: int) -> int:
    """Return the largest number of layer inputs, with one gradient, that are held at once."""
    return math.ceil(layers / every) + every


def logit_rows(vocab: int) -> int:
    """Return the number of tokens whose logits are held at once."""
    return max(_LOGITS // vocab, 1)


def read_gradients(
    stream: ModelStream,
    plans: Iterable[LayerPlan],
    calibration: Calibration,
    blocks: Tensor,
    batch_size: int,
    *,
    losses: bool = False,
    held: Callable[[int], nn.Module] | None = None,
    start: Progress = unseen,
) -> dict[int, GradientMoment]:
    """Return the gradient moments that the solvers need, by layer, offloaded as states are; empty if none are needed.

    ``calibration`` selects the blocks (n, tokens). With ``losses`` every target gets moments. ``held`` returns layers
    that are already on the device. ``start`` starts the progress.
    """
    architecture = stream.reader.architecture
    needed = {plan.index: gradients_needed(architecture, plan, losses=losses) for plan in plans}
    needed = {index: targets for index, targets in needed.items() if targets}
    if not needed:
        return {}
    chosen = gradient_blocks(blocks, calibration.gradient_samples, calibration.seed)
    return GradientSweep(stream, chosen, batch_size, layer=held, start=start).run(needed, calibration.seed)


class GradientSweep:
    """One forward and backward pass over token blocks (n, tokens), which the processes of the stream split.

    ``layer`` returns a layer on the device (default: read it from the checkpoint). ``every``: as ``stride`` returns it.
    ``start`` starts the progress.
    """

    def __init__(
        self,
        stream: ModelStream,
        blocks: Tensor,
        batch_size: int,
        *,
        layer: Callable[[int], nn.Module] | None = None,
        every: int | None = None,
        start: Progress = unseen,
    ) -> None:
        self._begin = start
        self._stream, self._architecture = stream, stream.reader.architecture
        self._layer = layer or (lambda index: stream.layer(index)[0])
        self._batches = stream.embed(batched(stream.processes.mine(blocks), batch_size))
        self._inputs = {0: [batch.hidden for batch in self._batches]}
        for batch in self._batches:  # so that the batches do not hold the states to the end
            batch.hidden = batch.hidden.new_empty(0)
        self._every = every or stride(
            self._architecture.layers, 4 * blocks.numel() * self._architecture.hidden
        )

    def run(self, needed: Mapping[int, GradientTargets], seed: int) -> dict[int, GradientMoment]:
        """Return the moments of the layers in ``needed``, offloaded as states are; call it once.

        ``seed`` and the block's number determine its labels. Raises UserError if gradients are NaN or inf.
        """
        last, first, found = self._architecture.layers - 1, min(needed), {}
        kept = range(first - first % self._every, last + 1, self._every)
        again = sum(min(index + self._every - 1, last) - index for index in kept)
        self._advance = self._begin("gradients", last + 1 + again + 1 + last + 1 - first)
        hidden = self._forward(0, last + 1, kept.__contains__)
        gradients = self._at_logits(hidden, seed)
        self._advance(1)
        del hidden
        for index in range(last, first - 1, -1):
            if index not in self._inputs:
                before = index - index % self._every
                self._inputs[index] = self._forward(before, index, lambda _: True)
            moment = self._back(index, gradients, needed.get(index, GradientTargets()))
            self._advance(1)
            if moment:
                found[index] = moment.moved(self._stream.states.keep)
        return found

    def _forward(self, first: int, end: int, keep: Callable[[int], bool]) -> list[Tensor]:
        """Return the input of layer ``end`` from that of ``first``; store inputs of layers that ``keep`` accepts."""
        hidden = self._inputs[first]
        for index in range(first, end):
            if keep(index):
                self._inputs[index] = hidden
            module, outputs = self._layer(index), []
            with self._stream.checked(module, index):
                for batch, (x,) in zip(self._batches, self._stream.prefetched(hidden), strict=True):
                    outputs.append(self._stream.states.keep(self._stream.run(module, index, batch, x)))
            hidden = outputs
            self._advance(1)
        return hidden

    def _at_logits(self, hidden: Sequence[Tensor], seed: int) -> list[Tensor]:
        """Return gradients at the last layer's output, with labels drawn for every position."""
        tail, device, processes, found = self._stream.tail(), self._stream.device, self._stream.processes, []
        number = processes.rank
        rows = logit_rows(self._architecture.vocab)
        for batch in hidden:
            parts = []
            for block in batch:
                generator = torch.Generator(device).manual_seed(seed_for(seed, f"gradients/{number}"))
                parts += [_drawn(tail, self._stream.fetch(part), generator) for part in block.split(rows)]
                number += processes.size
            found.append(self._stream.states.keep(torch.cat(parts).view_as(batch)))
        return found

    def _back(self, index: int, gradients: list[Tensor], needed: GradientTargets) -> GradientMoment | None:
        """Propagate the gradients through a layer, in place, and return its moments if ``needed``."""
        heads, device = self._architecture.geometry, self._stream.device
        module, inputs = self._layer(index), self._inputs.pop(index)
        # Sorted: all processes must use the same order.
        widths = {role: self._architecture.matrices[role].rows for role in sorted(needed.roles)}
        sums = GradientSum(heads, widths, queries=needed.queries, device=device)
        for i, (x, gradient) in enumerate(self._stream.prefetched(inputs, gradients)):
            gradients[i] = self._back_batch(module, index, self._batches[i], x, gradient, needed, sums)
        if not needed:
            return None
        sums.reduce(self._stream.processes)
        moment = sums.moment()
        if not moment.finite:
            raise UserError(f"layer {index}: gradients of the loss are NaN or inf; try --dtype float32")
        return moment

    def _back_batch(
        self,
        module: nn.Module,
        index: int,
        batch: Batch,
        hidden: Tensor,
        gradient: Tensor,
        needed: GradientTargets,
        sums: GradientSum,
    ) -> Tensor:
        x = hidden.detach().requires_grad_()
        roles = [*needed.roles, *(["q"] if needed.queries else [])]
        paths = {self._architecture.family.projections[role].module for role in roles}
        scale = _scale(gradient)
        with _same_bits(self._stream.device):  # the forward call chooses the backward kernel
            with observe(module, {path: path for path in paths}) as calls:
                out = self._stream.run(module, index, batch, x, grad=True)
            outputs = {path: calls[path].output for path in calls}
            found = torch.autograd.grad(out, [x, *outputs.values()], gradient * scale)
        if needed:
            at = dict(zip(outputs, found[1:], strict=True))
            queries = (self._rows(outputs, "q").detach(), self._rows(at, "q")) if needed.queries else None
            sums.add({role: self._rows(at, role) for role in needed.roles}, queries, scale)
        return self._stream.states.keep(found[0] / scale)

    def _rows(self, outputs: Mapping[str, Tensor], role: str) -> Tensor:
        """Return a role's part of its module's output."""
        return self._architecture.own(role, outputs[self._architecture.family.projections[role].module], -1)


def _drawn(tail: Callable[[Tensor], Tensor], hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient (tokens, hidden) of the summed loss in nats, with labels drawn from the model."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        logits = tail(hidden)
    slope = logits.detach().float().softmax(-1)
    if not bool(slope.isfinite().all()):
        raise UserError("the model's logits are NaN or inf; try --dtype float32")
    labels = torch.multinomial(slope, 1, generator=generator)
    slope.scatter_(-1, labels, slope.gather(-1, labels) - 1)
    scale = _scale(slope)
    (gradient,) = torch.autograd.grad(logits, hidden, slope.mul_(scale).to(logits.dtype))
    return gradient / scale


def _scale(gradient: Tensor) -> Tensor:
    """Return a power of two, exact in float32, that scales a gradient into the range of float16."""
    peak = gradient.abs().amax()
    # Limit the scale of gradients at or near zero.
    return torch.ldexp(torch.ones_like(peak), (_PEAK - peak.log2().ceil()).clamp_max(_LARGEST_SCALE))


@contextmanager
def _same_bits(device: torch.device) -> Iterator[None]:
    """Use deterministic algorithms on a GPU, so that a resumed run ends with the same bytes."""
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
