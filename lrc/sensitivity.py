"""Measures what shrinking each component or projection of each layer alone does to the loss on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lrc.allocate import Curve
from lrc.assemble import assemble
from lrc.collect import LayerSums
from lrc.evaluation.perplexity import token_nll
from lrc.moments.observe import observe
from lrc.plan.resolved import Assignment, LayerPlan, ResolvedPlan
from lrc.solve import collectors_needed, sites_needed, solve_layer
from lrc.stream import Batch, ModelStream


class Sensitivity:
    """A model held whole on the device, the moments' text and the held-out text at the layer that is being measured."""

    def __init__(self, stream: ModelStream, blocks: Tensor, held_out: Tensor, batch_size: int) -> None:
        """``blocks`` and ``held_out`` are token blocks (n, tokens): to take moments of, and to measure the loss on."""
        self._stream, self._architecture = stream, stream.reader.architecture
        self._held_ids = held_out.split(batch_size)
        self._batches = stream.embed(blocks, batch_size)
        self._held = stream.embed(held_out, batch_size)
        loaded = [stream.layer(index) for index in range(self._architecture.layers)]
        self._layers = [module for module, _ in loaded]
        self._states = [state for _, state in loaded]
        self._tail = stream.tail()
        self.tokens = held_out.numel() - len(held_out)

    def curves(self, plans: Sequence[ResolvedPlan], advance: Callable[[], None]) -> list[Curve]:
        """Curves of all targets from one plan worked out at several sizes; ``advance`` is called after each layer."""
        whole = self._loss(self._layers[0], 0)
        found = []
        for index, layer in enumerate(self._layers):
            asked = [plan.layers[index] for plan in plans]
            points = self._layer(index, asked, whole)
            found += [
                self._curve(index, target, points[target]) for target in sorted(points, key=self._order)
            ]
            for batch in (*self._batches, *self._held):
                batch.hidden = self._stream.run(layer, index, batch, batch.hidden)
            advance()
        return found

    def _layer(
        self, index: int, asked: Sequence[LayerPlan], whole: float
    ) -> dict[str, dict[int, tuple[Assignment, float]]]:
        """By target and size: what was asked and the nats per token that it costs."""
        wanted = {(a.target, a.size): a for plan in asked for a in plan.assignments}
        if not wanted:
            return {}
        plan = LayerPlan(index, tuple(wanted.values()))
        layer, state = self._layers[index], self._states[index]
        sums = LayerSums(
            self._stream,
            index,
            layer,
            state,
            sites_needed(self._architecture, plan),
            "attention" in collectors_needed(plan),
        )
        for batch in self._batches:
            with observe(layer, sums.watched) as calls:
                self._stream.run(layer, index, batch, batch.hidden)
            sums.add(calls)
        statistics = sums.results()
        found: dict[str, dict[int, tuple[Assignment, float]]] = {}
        for (target, size), assignment in wanted.items():
            alone = LayerPlan(index, (assignment,))
            solutions = solve_layer(self._architecture, alone, state, statistics)
            reduced = assemble(
                self._architecture,
                self._stream.skeletons[index],
                state,
                solutions.values(),
                self._stream.reader.dtype,
            )
            module = self._stream.filled(reduced.module, reduced.state)
            found.setdefault(target, {})[size] = (assignment, self._loss(module, index) - whole)
        return found

    def _curve(self, layer: int, target: str, points: dict[int, tuple[Assignment, float]]) -> Curve:
        sizes = sorted(points)
        assignment = points[sizes[0]][0]
        limits = self._architecture.targets[target]
        return Curve(
            layer=layer,
            target=target,
            sizes=tuple(sizes),
            nats=tuple(points[size][1] for size in sizes),
            full=limits.full,
            unit=assignment.kept // assignment.size,
            whole=assignment.whole,
            step=limits.step,
        )

    def _order(self, target: str) -> int:
        return list(self._architecture.targets).index(target)

    @torch.no_grad()
    def _loss(self, layer: nn.Module, index: int) -> float:
        """Nats per held-out token with ``layer`` in the place of the one at ``index``, from the states before it."""
        total = torch.zeros((), dtype=torch.float64, device=self._stream.device)
        for batch, ids in zip(self._held, self._held_ids, strict=True):
            total += token_nll(self._logits(layer, index, batch), ids).sum()
        return float(total) / self.tokens

    def _logits(self, layer: nn.Module, index: int, batch: Batch) -> Tensor:
        hidden = self._stream.run(layer, index, batch, batch.hidden)
        for later in range(index + 1, len(self._layers)):
            hidden = self._stream.run(self._layers[later], later, batch, hidden)
        return self._tail(hidden)
