"""Gradients of the loss at every layer, layer by layer: the model runs forward once, then its layers in reverse.

The labels are drawn from the model's own distribution at every position (the true Fisher information; text is needed
as input alone), and only activations are differentiated. Inputs of layers and the moments found wait where states do,
and the device holds one layer, its sums and one batch beside that. Of the inputs all are kept where they fit in
``_KEEP_ALL`` bytes, else every ⌈√layers⌉-th, and those between two are computed again when the way back gets there,
which costs one more forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lrc.errors import UserError
from lrc.moments.gradient import GradientMoment, GradientSum, Wanted
from lrc.moments.observe import observe
from lrc.plan.resolved import LayerPlan
from lrc.plan.schema import Calibration
from lrc.text.blocks import batched, gradient_blocks, seed_for
from lrc.walk.needs import gradients_needed
from lrc.walk.stream import Batch, ModelStream

_KEEP_ALL = 2**33
_LOGITS = 2**24  # elements at once
_PEAK = 4  # backward passes start from gradients whose largest is below 2**_PEAK
_LARGEST_SCALE = 60  # 2**_LARGEST_SCALE has a square in float32


def stride(layers: int, state_bytes: int) -> int:
    """Every how many layers the input is kept, of ``state_bytes`` each."""
    return 1 if layers * state_bytes <= _KEEP_ALL else math.ceil(layers**0.5)


def states_held(layers: int, every: int) -> int:
    """The most inputs of layers that wait, one gradient among them."""
    return math.ceil(layers / every) + every


def logit_rows(vocab: int) -> int:
    """Tokens whose logits are held at once."""
    return max(_LOGITS // vocab, 1)


def gradient_moments(
    stream: ModelStream,
    blocks: Tensor,
    wanted: Mapping[int, Wanted],
    batch_size: int,
    seed: int,
    *,
    layer: Callable[[int], nn.Module] | None = None,
    every: int | None = None,
) -> dict[int, GradientMoment]:
    """Gradient moments, where the stream's states wait, of the layers in ``wanted`` from token blocks (n, tokens).

    The processes of the stream split the blocks. The labels hang on ``seed`` and on the number of the block. ``layer``
    gives a layer on the device (default: read from the checkpoint, once for each pass); ``every`` how many layers lie
    between inputs that are kept. Raises UserError where gradients are NaN or inf.
    """
    sweep = _Sweep(stream, blocks, batch_size, layer or (lambda index: stream.layer(index)[0]), every)
    return sweep.run(wanted, seed)


def read_gradients(
    stream: ModelStream,
    plans: Iterable[LayerPlan],
    calibration: Calibration,
    blocks: Tensor,
    batch_size: int,
    *,
    losses: bool = False,
    held: Callable[[int], nn.Module] | None = None,
) -> dict[int, GradientMoment]:
    """Return the gradient moments that the solvers of layers need, where states wait, by layer.

    They are of the calibration blocks (n, tokens) that its settings choose. With ``losses`` they are of every target.
    ``held`` gives layers that are on the device already. No sweep is made where nothing is needed.
    """
    architecture = stream.reader.architecture
    wanted = {plan.index: gradients_needed(architecture, plan, losses=losses) for plan in plans}
    wanted = {index: want for index, want in wanted.items() if want}
    if not wanted:
        return {}
    chosen = gradient_blocks(blocks, calibration.gradient_samples, calibration.seed)
    return gradient_moments(stream, chosen, wanted, batch_size, calibration.seed, layer=held)


class _Sweep:
    """Blocks on their way through the model, and the inputs of layers that are kept, by layer and batch."""

    def __init__(
        self,
        stream: ModelStream,
        blocks: Tensor,
        batch_size: int,
        layer: Callable[[int], nn.Module],
        every: int | None,
    ) -> None:
        self._stream, self._architecture, self._layer = stream, stream.reader.architecture, layer
        self._batches = stream.embed(batched(stream.processes.mine(blocks), batch_size))
        self._inputs = {0: [batch.hidden for batch in self._batches]}
        for batch in self._batches:  # a batch itself would keep them to the end
            batch.hidden = batch.hidden.new_empty(0)
        self._every = every or stride(
            self._architecture.layers, 4 * blocks.numel() * self._architecture.hidden
        )

    def run(self, wanted: Mapping[int, Wanted], seed: int) -> dict[int, GradientMoment]:
        last, first, found = self._architecture.layers - 1, min(wanted), {}
        start = first - first % self._every
        hidden = self._forward(0, last + 1, lambda index: index >= start and index % self._every == 0)
        gradients = self._at_logits(hidden, seed)
        del hidden
        for index in range(last, first - 1, -1):
            if index not in self._inputs:
                before = index - index % self._every
                self._inputs[index] = self._forward(before, index, lambda _: True)
            moment = self._back(index, gradients, wanted.get(index, Wanted()))
            if moment:
                found[index] = moment.moved(self._stream.states.keep)
        return found

    def _forward(self, first: int, end: int, keep: Callable[[int], bool]) -> list[Tensor]:
        """From the input of layer ``first`` to that of ``end``, keeping those of the layers that ``keep`` names."""
        hidden = self._inputs[first]
        for index in range(first, end):
            if keep(index):
                self._inputs[index] = hidden
            module, finite, passed = self._layer(index), [], []
            for batch, (x,) in zip(self._batches, self._stream.passing(hidden), strict=True):
                out = self._stream.run(module, index, batch, x)
                finite.append(out.isfinite().all())
                passed.append(self._stream.states.keep(out))
            if finite and not bool(torch.stack(finite).all()):
                raise UserError(f"layer {index}: activations are NaN or inf; try --dtype float32")
            hidden = passed
        return hidden

    def _at_logits(self, hidden: Sequence[Tensor], seed: int) -> list[Tensor]:
        """Gradients at the last layer's output, with labels drawn for every position."""
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

    def _back(self, index: int, gradients: list[Tensor], wanted: Wanted) -> GradientMoment | None:
        """Take the gradients, in place, from a layer's output to its input; its moments on the way."""
        heads, module, inputs = self._architecture.geometry, self._layer(index), self._inputs.pop(index)
        # In an order that is the same in all processes.
        widths = {role: self._architecture.matrices[role].rows for role in sorted(wanted.roles)}
        sums = GradientSum(
            heads.kv_heads,
            heads.head_dim,
            heads.rotary != "none",
            widths,
            queries=wanted.queries,
            device=self._stream.device,
        )
        for i, (x, gradient) in enumerate(self._stream.passing(inputs, gradients)):
            gradients[i] = self._back_batch(module, index, self._batches[i], x, gradient, wanted, sums)
        if not wanted:
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
        wanted: Wanted,
        sums: GradientSum,
    ) -> Tensor:
        x = hidden.detach().requires_grad_()
        roles = [*wanted.roles, *(["q"] if wanted.queries else [])]
        paths = {self._architecture.family.projections[role].module for role in roles}
        scale = _scale(gradient)
        with _same_bits(self._stream.device):  # the way there chooses the attention's kernel for the way back
            with observe(module, {path: path for path in paths}) as calls:
                out = self._stream.run(module, index, batch, x, grad=True)
            outputs = {path: calls[path].output for path in calls}
            found = torch.autograd.grad(out, [x, *outputs.values()], gradient * scale)
        if wanted:
            at = dict(zip(outputs, found[1:], strict=True))
            queries = (self._rows(outputs, "q").detach(), self._rows(at, "q")) if wanted.queries else None
            sums.add({role: self._rows(at, role) for role in wanted.roles}, queries, scale)
        return self._stream.states.keep(found[0] / scale)

    def _rows(self, outputs: Mapping[str, Tensor], role: str) -> Tensor:
        """A role's part of what its module puts out."""
        return outputs[self._architecture.family.projections[role].module][
            ..., self._architecture.output_rows(role)
        ]


def _drawn(tail: Callable[[Tensor], Tensor], hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient (tokens, hidden) of the summed nats of labels drawn from the model's own distribution."""
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
    """A power of two that brings a gradient into the narrow range of float16; in wider formats it changes no bit."""
    peak = gradient.abs().amax()
    # A gradient of nothing, or of nearly nothing, has no scale of its own.
    return torch.ldexp(torch.ones_like(peak), (_PEAK - peak.log2().ceil()).clamp_max(_LARGEST_SCALE))


@contextmanager
def _same_bits(device: torch.device) -> Iterator[None]:
    """Sums in a fixed order: fast attention on a GPU goes backward in none unless told, and a run taken up again must
    end with the same bytes.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
