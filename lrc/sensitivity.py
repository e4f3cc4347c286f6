"""Measures what shrinking each component or projection of each layer alone does to the loss on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lrc.allocate import Curve
from lrc.assemble import assemble
from lrc.collect import Statistics, collect
from lrc.errors import UserError
from lrc.evaluation.perplexity import token_nll
from lrc.families import Architecture
from lrc.gradients import gradient_moments
from lrc.moments.gradient import GradientMoment
from lrc.plan.resolved import Assignment, LayerPlan, ResolvedPlan
from lrc.solve import collectors_needed, gradients_needed, sites_needed, solve_layer
from lrc.stream import Batch, ModelStream
from lrc.text.blocks import gradient_blocks


def unmeasured(architecture: Architecture, plans: Sequence[ResolvedPlan]) -> list[Curve]:
    """What there is to measure of a plan worked out at several sizes: curves of no cost, the layers in their order.

    What stays whole at all of the sizes has none. Raises UserError where weights do not grow evenly with a method's
    sizes, which is what curves are made of.
    """
    found = []
    for index in range(architecture.layers):
        asked: dict[str, dict[int, Assignment]] = {}
        for plan in plans:
            for one in plan.layers[index].assignments:
                asked.setdefault(one.target, {})[one.size] = one
        for name, by_size in asked.items():
            first, target = next(iter(by_size.values())), architecture.targets[name]
            unit, sizes = first.kept // first.size, tuple(sorted(by_size))
            if any(one.kept != size * unit for size, one in by_size.items()):
                raise UserError(
                    f"method {first.method!r} has no sizes of even weight for {name}, so there is no curve"
                )
            costs = (0.0,) * len(sizes)
            found.append(Curve(index, name, sizes, costs, target.full, unit, first.whole, target.step))
    return found


def passes(architecture: Architecture, curves: Sequence[Curve]) -> int:
    """Layers that measuring curves runs over the held-out text: for each size those from its own to the last."""
    return sum((architecture.layers - curve.layer) * len(curve.sizes) for curve in curves)


class Sensitivity:
    """A model held whole on the device, the moments' text and the held-out text at the layer that is being measured.

    ``loss``: nats per held-out token of the model as it is.
    """

    def __init__(self, stream: ModelStream, blocks: Tensor, held_out: Tensor, batch_size: int) -> None:
        """``blocks`` and ``held_out`` are token blocks (n, tokens): to take moments of, and to measure the loss on."""
        self._stream, self._architecture = stream, stream.reader.architecture
        self._blocks, self._batch_size = blocks, batch_size
        self._held_ids = held_out.split(batch_size)
        self._tokens = held_out.numel() - len(held_out)
        self._batches = stream.embed(blocks, batch_size)
        self._held = stream.embed(held_out, batch_size)
        loaded = [stream.layer(index) for index in range(self._architecture.layers)]
        self._layers = [module for module, _ in loaded]
        self._states = [state for _, state in loaded]
        self._tail = stream.tail()
        self.loss = self._loss(self._layers[0], 0)

    def curves(self, plans: Sequence[ResolvedPlan], advance: Callable[[int], object]) -> list[Curve]:
        """The curves that are ``unmeasured`` of the plans, measured.

        ``advance`` is called with the layers run, ``passes`` in all. Raises UserError where a loss is not finite.
        """
        blank, found = unmeasured(self._architecture, plans), []
        gradients = self._sweep(plans)
        for index, layer in enumerate(self._layers):
            asked = _asked(plans, index)
            if asked:
                statistics = self._observe(_at_all_sizes(plans, index), gradients.pop(index, None))
            for curve in (curve for curve in blank if curve.layer == index):
                nats = []
                for size in curve.sizes:
                    nats.append(self._alone(index, asked[curve.target, size], statistics) - self.loss)
                    advance(len(self._layers) - index)
                found.append(replace(curve, nats=tuple(nats)))
            for batch in (*self._batches, *self._held):
                batch.hidden = self._stream.run(layer, index, batch, batch.hidden)
        return found

    def _sweep(self, plans: Sequence[ResolvedPlan]) -> dict[int, GradientMoment]:
        """Gradients for the solvers, on the host, as a compression by the plans would have them."""
        whole = (_at_all_sizes(plans, index) for index in range(len(self._layers)))
        wanted = {
            layer.index: want for layer in whole if (want := gradients_needed(self._architecture, layer))
        }
        if not wanted:
            return {}
        settings = plans[0].plan.calibration
        chosen = gradient_blocks(self._blocks, settings.gradient_samples, settings.seed)
        held = self._layers.__getitem__
        return gradient_moments(self._stream, chosen, wanted, self._batch_size, settings.seed, layer=held)

    def _observe(self, plan: LayerPlan, gradients: GradientMoment | None) -> Statistics:
        layer, state = self._layers[plan.index], self._states[plan.index]
        sites, collectors = sites_needed(self._architecture, plan), collectors_needed(plan)
        found = collect(self._stream, plan.index, layer, state, self._batches, sites, collectors)
        return replace(found, gradients=gradients and gradients.to(self._stream.device))

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


def _asked(plans: Sequence[ResolvedPlan], index: int) -> dict[tuple[str, int], Assignment]:
    """What several plans ask of one layer, by target and size."""
    return {(a.target, a.size): a for plan in plans for a in plan.layers[index].assignments}


def _at_all_sizes(plans: Sequence[ResolvedPlan], index: int) -> LayerPlan:
    """One layer's assignments in all plans together."""
    return LayerPlan(index, tuple(_asked(plans, index).values()))
