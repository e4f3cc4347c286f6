"""Measures what shrinking each component or projection of each layer alone does to the loss on held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lrc.allocate import Curve
from lrc.allocation.contract import Advance, Costs, Setting, blank_curves
from lrc.assemble import assemble
from lrc.collect import Statistics
from lrc.errors import UserError
from lrc.evaluation.perplexity import token_nll
from lrc.families import Architecture
from lrc.moments.gradient import GradientMoment
from lrc.plan.resolved import Assignment, LayerPlan
from lrc.solve import read_statistics, solve_layer
from lrc.stream import Batch, ModelStream


def costs(setting: Setting, advance: Advance) -> Costs:
    """The rise of the loss that each target alone causes at each of its sizes, all else whole.

    Raises UserError where a loss is not finite.
    """
    measuring = Sensitivity(setting)
    return Costs(measuring.curves(advance), "nats", measuring.loss)


def passes(architecture: Architecture, curves: Sequence[Curve]) -> int:
    """Layers that measuring curves runs over the held-out text: for each size those from its own to the last."""
    return sum((architecture.layers - curve.layer) * len(curve.sizes) for curve in curves)


class Sensitivity:
    """A model held whole on the device, the moments' text and the held-out text at the layer that is being measured.

    ``loss``: nats per held-out token of the model as it is.
    """

    def __init__(self, setting: Setting) -> None:
        stream = ModelStream(setting.reader, setting.device, setting.dtype)
        held_out, batch_size = setting.texts.held_blocks, setting.batch_size
        assert held_out is not None, "sensitivity is measured on held-out text"
        self._setting, self._stream, self._architecture = setting, stream, setting.reader.architecture
        self._held_ids = held_out.split(batch_size)
        self._tokens = held_out.numel() - len(held_out)
        self._batches = stream.embed(setting.texts.calibration.blocks, batch_size)
        self._held = stream.embed(held_out, batch_size)
        loaded = [stream.layer(index) for index in range(self._architecture.layers)]
        self._layers = [module for module, _ in loaded]
        self._states = [state for _, state in loaded]
        self._tail = stream.tail()
        self.loss = self._loss(self._layers[0], 0)

    def curves(self, advance: Advance) -> list[Curve]:
        """The ``blank_curves`` of the plans, measured.

        ``advance`` is called with the layers run, ``passes`` in all. Raises UserError where a loss is not finite.
        """
        setting = self._setting
        blank, found = blank_curves(self._architecture, setting.plans), []
        gradients = setting.gradients(self._stream, self._layers.__getitem__)
        for index, layer in enumerate(self._layers):
            asked = setting.asked(index)
            if asked:
                statistics = self._observe(setting.at_all_sizes(index), gradients.pop(index, None))
            for curve in (curve for curve in blank if curve.layer == index):
                nats = []
                for size in curve.sizes:
                    nats.append(self._alone(index, asked[curve.target, size], statistics) - self.loss)
                    advance(len(self._layers) - index)
                found.append(replace(curve, costs=tuple(nats)))
            for batch in (*self._batches, *self._held):
                batch.hidden = self._stream.run(layer, index, batch, batch.hidden)
        return found

    def _observe(self, plan: LayerPlan, gradients: GradientMoment | None) -> Statistics:
        layer, state = self._layers[plan.index], self._states[plan.index]
        return read_statistics(self._stream, plan, layer, state, self._batches, gradients)

    def _alone(self, index: int, assignment: Assignment, statistics: Statistics) -> float:
        """Nats per held-out token with nothing but one target of one layer shrunk."""
        state = self._states[index]
        solutions = solve_layer(
            self._architecture, LayerPlan(index, (assignment,)), state, statistics
        ).values()
        skeleton, dtype = self._stream.skeletons[index], self._stream.reader.dtype
        reduced = assemble(self._architecture, skeleton, state, solutions, dtype)
        return self._loss(self._stream.filled(reduced.module, reduced.state), index)

    @torch.no_grad()
    def _loss(self, layer: nn.Module, index: int) -> float:
        """Nats per held-out token with ``layer`` in the place of the one at ``index``, from the states before it."""
        total = torch.zeros((), dtype=torch.float64, device=self._stream.device)
        for batch, ids in zip(self._held, self._held_ids, strict=True):
            total += token_nll(self._logits(layer, index, batch), ids).sum()
        if not math.isfinite(loss := float(total) / self._tokens):
            raise UserError(f"the loss measured at layer {index} is NaN or inf; try --dtype float32")
        return loss

    def _logits(self, layer: nn.Module, index: int, batch: Batch) -> Tensor:
        hidden = self._stream.run(layer, index, batch, batch.hidden)
        for later in range(index + 1, len(self._layers)):
            hidden = self._stream.run(self._layers[later], later, batch, hidden)
        return self._tail(hidden)
