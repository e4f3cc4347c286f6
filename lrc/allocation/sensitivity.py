"""Sensitivity: measure how far the model's predictions on held-out text move when one target alone is shrunk.

The cost is KL(original ‖ model) per token, the rise of the loss on text that the original writes. Differences of the
loss on the text itself have the same mean there, but far more noise: each token adds its own luck. A change in one
layer also changes how half precision rounds in all later ones. Independent errors add up in KL, so the divergence of
rounding alone is measured once for each layer and table, and subtracted; noise can leave a cost below 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lrc.allocation.contract import Advance, Setting
from lrc.allocation.spend import Curve
from lrc.compression.embedding import make_outer_problems, store_outer
from lrc.compression.solve import make_problem, solve
from lrc.errors import UserError
from lrc.evaluation.tokens import divergence, token_nll
from lrc.families import Architecture
from lrc.methods.contract import Problem, Solution
from lrc.plan.resolved import Assignment
from lrc.text.blocks import batched
from lrc.walk.stream import Batch
from lrc.walk.walk import Walk

# Of a precision's epsilon. It changes enough roundings for four fifths of their variance, and adds about 1 % itself.
_UNSEEN = 1 / 8
_SEED = 0


def costs(setting: Setting, curves: Sequence[Curve], advance: Advance) -> tuple[list[Curve], float]:
    """Return the KL divergence that each target alone causes at each of its sizes, and the original's loss.

    Raises UserError if either is not finite.
    """
    measuring = Sensitivity(setting)
    return measuring.curves(curves, advance), measuring.loss


def passes(architecture: Architecture, curves: Sequence[Curve]) -> int:
    """Return how many layer runs over the held-out text the curves need, without those that measure rounding.

    Each size runs the layers from its own to the last; the embedding runs all, the head none.
    """
    return sum(_layers_run(architecture, curve) * len(curve.sizes) for curve in curves)


def _layers_run(architecture: Architecture, curve: Curve) -> int:
    if curve.layer is None:
        return architecture.layers if curve.target == "embed" else 0
    return architecture.layers - curve.layer


class Sensitivity:
    """Measure curves with the whole model on the device.

    Every process holds the model and its part of the calibration and held-out texts. ``loss``: the original model's
    nats per held-out token.
    """

    def __init__(self, setting: Setting) -> None:
        stream, mine = setting.stream, setting.processes.mine
        held_out, batch_size = setting.texts.held_blocks, setting.batch_size
        assert held_out is not None, "sensitivity is measured on held-out text"
        self._setting, self._stream, self._architecture = setting, stream, setting.reader.architecture
        self._held_ids = batched(mine(held_out), batch_size)
        self._batches = stream.embed(batched(mine(setting.texts.calibration.blocks), batch_size))
        self._held = stream.embed(self._held_ids)
        loaded = [stream.layer(index) for index in range(self._architecture.layers)]
        self._layers = [module for module, _ in loaded]
        self._states = [state for _, state in loaded]
        self._tail = stream.tail()
        self._tokens = held_out.numel() - len(held_out)
        # After the last layer. Their logits would be too large to keep.
        self._original = [self._through(0, batch) for batch in self._held]
        self.loss = self._loss()

    def curves(self, blank: Sequence[Curve], advance: Advance) -> list[Curve]:
        """Return curves with measured costs.

        ``advance`` is called with the layers run, ``passes`` in all. Raises UserError if a loss is not finite.
        """
        setting, found = self._setting, []
        gradients = setting.gradients(self._stream, self._layers.__getitem__)

        def held(index: int) -> tuple[nn.Module, Mapping[str, Tensor]]:
            return self._layers[index], self._states[index]

        for visit in Walk(self._stream, self._batches, first_token=setting.first_token, load=held):
            if here := [curve for curve in blank if curve.layer == visit.index]:
                known = visit.read(setting.at_all_sizes(visit.index), gradients.pop(visit.index, None))
                state = self._states[visit.index]
                problem = partial(make_problem, self._architecture, state=state, found=known)
                alone, rounding = partial(self._alone, visit.index), self._rounding(visit.index, self._held)
                found += self._measured(here, problem, alone, rounding, advance)
                del known, problem  # large: the moments of this layer
            self._stream.advance(self._layers[visit.index], visit.index, self._held)
        if tables := [curve for curve in blank if curve.layer is None]:
            targets, blocks = [curve.target for curve in tables], setting.texts.calibration.blocks
            problems = make_outer_problems(self._stream, targets, blocks, self._batches)
            for curve in tables:
                rounding = self._table_rounding(curve.target)
                found += self._measured([curve], problems.__getitem__, self._table_alone, rounding, advance)
        return found

    def _measured(
        self,
        curves: Sequence[Curve],
        problem: Callable[[str], Problem],
        alone: Callable[[str, Solution], float],
        rounding: float,
        advance: Advance,
    ) -> list[Curve]:
        """Return the curves with costs; ``alone`` returns the divergence with one target compressed."""

        def solution(assignment: Assignment) -> Solution:
            return solve(problem(assignment.target), assignment)

        found = []
        for curve in curves:
            known, nats = self._setting.assignments(curve.layer), []
            assignments = [known[curve.target, size] for size in curve.sizes]
            for solved in self._setting.processes.spread(assignments, solution):
                nats.append(alone(curve.target, solved) - rounding)
                advance(_layers_run(self._architecture, curve))
            found.append(replace(curve, costs=tuple(nats)))
        return found

    def _rounding(self, first: int, batches: Sequence[Batch]) -> float:
        """Return the divergence that half precision alone causes from layer ``first`` on.

        The inputs of the layer, in ``batches``, are changed by less than the precision can tell apart. For the last
        targets of a layer this is an upper estimate, as its first projections round too.
        """
        stream = self._stream
        if stream.dtype == torch.float32:
            return 0.0  # far below any cost
        generator = torch.Generator(stream.device).manual_seed(_SEED)
        size = _UNSEEN * torch.finfo(stream.dtype).eps

        def changed(batch: Batch) -> Tensor:
            hidden = stream.fetch(batch.hidden)
            drawn = torch.randn(hidden.shape, generator=generator, device=hidden.device)
            return self._through(first, replace(batch, hidden=hidden * (1 + size * drawn)))

        return self._divergence(map(changed, batches), f"before layer {first}")

    def _table_rounding(self, target: str) -> float:
        if target == "embed":
            return self._rounding(0, self._stream.embed(self._held_ids))
        return self._rounding(self._architecture.layers, self._held)

    def _alone(self, index: int, _: str, solution: Solution) -> float:
        """Return the divergence with one target of one layer compressed."""
        layer = self._setting.reduced(self._stream, index, self._states[index], solution)
        hidden = (self._through(index, batch, layer) for batch in self._held)
        return self._divergence(hidden, f"at layer {index}")

    def _table_alone(self, target: str, solution: Solution) -> float:
        """Return the divergence with only the embedding, the head or the tied table compressed.

        The held-out states are those after the last layer; a compressed embedding needs a new run through all layers.
        """
        stream = self._stream
        reduced = store_outer(stream, solution)
        embedding, head = (reduced.module(stream, each) for each in ("embed", "lm_head"))
        hidden = (batch.hidden for batch in self._held)
        if embedding is not None:
            again = stream.embed(self._held_ids, embedding)
            hidden = (self._through(0, batch) for batch in again)
        tail = None if head is None else stream.tail(head)
        return self._divergence(hidden, f"with {target} reduced", tail)

    @torch.no_grad()
    def _loss(self) -> float:
        """Return the original's nats per held-out token."""
        pairs = zip(self._original, self._held_ids, strict=True)
        return self._mean(
            (token_nll(self._tail(states), ids) for states, ids in pairs), "of the model as it is"
        )

    @torch.no_grad()
    def _divergence(
        self, hidden: Iterable[Tensor], where: str, tail: Callable[[Tensor], Tensor] | None = None
    ) -> float:
        """Return KL(original ‖ model) per held-out token from the last layer's outputs, by batch.

        ``tail`` replaces the model's.
        """
        batches = zip(hidden, self._original, self._held_ids, strict=True)
        logits = (
            ((tail or self._tail)(states), self._tail(original), ids) for states, original, ids in batches
        )
        return self._mean((divergence(*each).kl for each in logits), where)

    def _mean(self, nats: Iterable[Tensor], where: str) -> float:
        """Return the mean over the held-out tokens of all processes. Raises UserError if it is not finite."""
        total = torch.zeros((), dtype=torch.float64, device=self._stream.device)
        for each in nats:
            total += each.double().sum()
        if not math.isfinite(mean := float(self._setting.processes.total(total)) / self._tokens):
            raise UserError(f"the loss measured {where} is NaN or inf; try --dtype float32")
        return mean

    def _through(self, first: int, batch: Batch, layer: nn.Module | None = None) -> Tensor:
        """Run a batch from layer ``first`` through the last; ``layer`` replaces layer ``first``."""
        hidden = batch.hidden
        for index, whole in enumerate(self._layers[first:], first):
            module = layer if layer is not None and index == first else whole
            hidden = self._stream.run(module, index, batch, hidden)
        return hidden
