"""Sensitivity: measure the rise of the held-out loss when one target alone is shrunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lrc.allocation.contract import Advance, Setting
from lrc.allocation.spend import Curve
from lrc.compression.solve import pose, solve
from lrc.compression.tables import pose_outer, store_outer
from lrc.errors import UserError
from lrc.evaluation.tokens import token_nll
from lrc.families import Architecture
from lrc.methods.contract import Problem, Solution
from lrc.plan.resolved import Assignment
from lrc.text.blocks import batched
from lrc.walk.stream import Batch
from lrc.walk.walk import Walk


def costs(setting: Setting, curves: Sequence[Curve], advance: Advance) -> tuple[list[Curve], float]:
    """Return the rise of the loss from each target alone at each of its sizes.

    Raises UserError if a loss is not finite.
    """
    measuring = Sensitivity(setting)
    return measuring.curves(curves, advance), measuring.loss


def passes(architecture: Architecture, curves: Sequence[Curve]) -> int:
    """Return how many layer runs over the held-out text the curves need.

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
        self._tokens = held_out.numel() - len(held_out)
        self._batches = stream.embed(batched(mine(setting.texts.calibration.blocks), batch_size))
        self._held = stream.embed(self._held_ids)
        loaded = [stream.layer(index) for index in range(self._architecture.layers)]
        self._layers = [module for module, _ in loaded]
        self._states = [state for _, state in loaded]
        self._tail = stream.tail()
        self.loss = self._loss((self._through(0, batch) for batch in self._held), "of the model as it is")

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
                problem = partial(pose, self._architecture, state=state, found=known)
                found += self._measured(here, problem, partial(self._alone, visit.index), advance)
                del known, problem  # large: the moments of this layer
            self._stream.advance(self._layers[visit.index], visit.index, self._held)
        if tables := [curve for curve in blank if curve.layer is None]:
            targets, blocks = [curve.target for curve in tables], setting.texts.calibration.blocks
            problems = pose_outer(self._stream, targets, blocks, self._batches)
            found += self._measured(tables, problems.__getitem__, self._table_alone, advance)
        return found

    def _measured(
        self,
        curves: Sequence[Curve],
        problem: Callable[[str], Problem],
        alone: Callable[[str, Solution], float],
        advance: Advance,
    ) -> list[Curve]:
        """Return the curves with costs; ``alone`` returns the loss with one target compressed."""

        def solution(assignment: Assignment) -> Solution:
            return solve(problem(assignment.target), assignment)

        found = []
        for curve in curves:
            known, nats = self._setting.assignments(curve.layer), []
            assignments = [known[curve.target, size] for size in curve.sizes]
            for solved in self._setting.processes.spread(assignments, solution):
                nats.append(alone(curve.target, solved) - self.loss)
                advance(_layers_run(self._architecture, curve))
            found.append(replace(curve, costs=tuple(nats)))
        return found

    def _alone(self, index: int, _: str, solution: Solution) -> float:
        """Return the nats per held-out token with one target of one layer compressed."""
        layer = self._setting.reduced(self._stream, index, self._states[index], solution)
        hidden = (self._through(index, batch, layer) for batch in self._held)
        return self._loss(hidden, f"at layer {index}")

    def _table_alone(self, target: str, solution: Solution) -> float:
        """Return the nats per held-out token with only the embedding, the head or the tied table compressed.

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
        return self._loss(hidden, f"with {target} reduced", tail)

    @torch.no_grad()
    def _loss(
        self, hidden: Iterable[Tensor], where: str, tail: Callable[[Tensor], Tensor] | None = None
    ) -> float:
        """Return nats per held-out token from the last layer's outputs, by batch; ``tail`` replaces the model's."""
        total = torch.zeros((), dtype=torch.float64, device=self._stream.device)
        for states, ids in zip(hidden, self._held_ids, strict=True):
            total += token_nll((tail or self._tail)(states), ids).double().sum()
        if not math.isfinite(loss := float(self._setting.processes.total(total)) / self._tokens):
            raise UserError(f"the loss measured {where} is NaN or inf; try --dtype float32")
        return loss

    def _through(self, first: int, batch: Batch, layer: nn.Module | None = None) -> Tensor:
        """Run a batch from layer ``first`` through the last; ``layer`` replaces layer ``first``."""
        hidden = batch.hidden
        for index, whole in enumerate(self._layers[first:], first):
            module = layer if layer is not None and index == first else whole
            hidden = self._stream.run(module, index, batch, hidden)
        return hidden
