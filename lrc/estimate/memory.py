"""Estimate an upper bound of a compression's GPU memory from shapes.

The bound is the largest of the backward sweep, the embedding and head, and each layer's moments, solves, measurements
and refits. Hidden states and gradient moments add to it: all of them if kept on the GPU, a few batches if offloaded.
Not counted: workspaces of the linear algebra library and fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from lrc.compression.logit_scale import CHUNK_BYTES
from lrc.compression.refit import held_out_mask
from lrc.estimate.sizes import inner_width
from lrc.families import Architecture
from lrc.maths.linalg import column_part
from lrc.methods.contract import Shapes
from lrc.moments.attention import QUERIES
from lrc.moments.attention_samples import SAMPLES
from lrc.plan.job import Job
from lrc.plan.resolved import LayerPlan
from lrc.run.offload import Place
from lrc.walk.backward import logit_rows, states_held, stride
from lrc.walk.needs import collectors_needed, gradients_needed, sites_needed, solver_of

HELD_OUT_SAMPLES = 16  # default number of held-out blocks to measure sizes on
ASSUMED_SAMPLES = 128  # for `samples: all`, as the text is not read yet


@dataclass(frozen=True)
class Memory:
    """Hold the estimated ``peak`` bytes of a run on the GPU, with hidden states on ``place``.

    ``states``: bytes of hidden states. ``gradients``: bytes of layer inputs and gradient moments, 0 without gradients.
    ``peak`` includes both only if ``place`` is the device. ``samples`` and ``batch_size`` are in blocks.
    """

    peak: int
    states: int
    gradients: int
    samples: int
    batch_size: int
    dtype: str
    place: Place


@dataclass(frozen=True)
class _Run:
    """Hold a compression; ``losses``: an allocation reads gradients of all targets."""

    job: Job
    samples: int
    dtype: torch.dtype
    batch_size: int
    place: Place
    losses: bool

    @property
    def architecture(self) -> Architecture:
        return self.job.reader.architecture

    @property
    def refits(self) -> bool:
        return self.job.plan.plan.refit == "residual"

    @cached_property
    def stored(self) -> set[torch.dtype]:
        """Return the dtypes of the layers' weights."""
        reader = self.job.reader
        layers = range(self.architecture.layers)
        return {reader.weight(role, i).dtype for i in layers for role in self.architecture.matrices}

    @property
    def stored_bytes(self) -> int:
        """Return the bytes of a layer's weight as stored, of the widest."""
        return max(dtype.itemsize for dtype in self.stored)

    @property
    def shared(self) -> bool:
        """Tell whether layers run in the stored dtype, in the same tensors."""
        return self.stored == {self.dtype}

    @property
    def weights(self) -> int:
        """Return the bytes of a layer, as stored and as run."""
        each = self.dtype.itemsize + (0 if self.shared else self.stored_bytes)
        return self.architecture.layer_parameters * each

    @property
    def tables(self) -> int:
        """Return the bytes of the weights outside the layers, as run."""
        inside = self.architecture.layers * self.architecture.layer_parameters
        return (self.architecture.total_parameters - inside) * self.dtype.itemsize

    @property
    def gradient_samples(self) -> int:
        return min(self.job.plan.plan.calibration.gradient_samples, self.samples)

    @property
    def held_out(self) -> int:
        return int(held_out_mask(self.samples).sum()) or self.samples

    def stream(self, samples: int) -> int:
        """Return the bytes of the hidden states of ``samples`` blocks."""
        return 4 * samples * self.job.plan.seq_len * self.architecture.hidden

    def states(self, layer: LayerPlan) -> int:
        """Return the bytes of hidden states while a layer is compressed.

        They are both streams, the stream between the layer's halves, held-out blocks and inputs of the refitted o.
        """
        streams = self.stream(self.samples) * (2 if self.refits or self.job.plan.outer else 1)
        if not layer.assignments:
            return streams
        between = self.stream(self.samples) if self.refits else 0
        width = _refit_widths(self.architecture, layer).get("attention", 0) if self.refits else 0
        read = width * self.samples * self.job.plan.seq_len * self.dtype.itemsize
        return streams + between + self.stream(self.held_out) + read

    def gradient(self, layer: LayerPlan) -> int:
        """Return the bytes of one layer's gradient moments."""
        architecture, heads = self.architecture, self.architecture.geometry
        wanted = gradients_needed(architecture, layer, losses=self.losses)
        width = heads.head_dim if heads.rotary == "none" else heads.head_dim // 2
        outputs = sum(architecture.matrices[role].rows ** 2 for role in wanted.roles)
        return 4 * (outputs + (heads.kv_heads * width**2 if wanted.queries else 0))

    def here(self, held: int) -> int:
        """Return the bytes on the GPU of hidden states of ``held`` bytes at their place."""
        return held if self.place == "device" else min(held, 4 * self.stream(self.batch_size))


def estimate_memory(
    job: Job,
    dtype: torch.dtype,
    batch_size: int,
    place: Place = "device",
    *,
    samples: int | None = None,
    losses: bool = False,
) -> Memory:
    """Return the most GPU memory that ``lrc compress`` takes, with ``batch_size`` blocks at once in ``dtype``.

    ``samples``: calibration blocks (default: the plan's). ``losses``: an allocation reads gradients of all targets.
    """
    asked = job.plan.plan.calibration.samples
    samples = samples or (ASSUMED_SAMPLES if asked == "all" else asked)
    run, layers = _Run(job, samples, dtype, min(batch_size, samples), place, losses), job.plan.layers
    moments, state = sum(map(run.gradient, layers)), run.stream(run.gradient_samples)
    count = run.architecture.layers
    gradients = moments + states_held(count, stride(count, state)) * state if moments else 0
    states = max(map(run.states, layers))
    waiting = run.here(states) + (moments if place == "device" else 0)
    peak = waiting + max(_tables(run), *(_layer(run, layer) for layer in layers))
    if gradients:
        peak = max(peak, run.here(gradients) + _sweep(run))
    return Memory(peak, states, gradients, samples, run.batch_size, str(dtype).removeprefix("torch."), place)


def measuring_memory(
    job: Job, dtype: torch.dtype, batch_size: int, samples: int, held_out: int, place: Place = "device"
) -> int:
    """Return the bytes that ``lrc.allocation.sensitivity`` takes, with hidden states on ``place``.

    They are those of a compression without refit, the whole model, a reduced table, the held-out states three times and
    a batch's logits twice. ``samples`` and ``held_out`` count blocks.
    """
    architecture, plan = job.reader.architecture, job.plan.plan
    alone = replace(job.plan, plan=plan.model_copy(update={"refit": "none"}), outer=job.plan.unsized(None))
    one = estimate_memory(replace(job, plan=alone), dtype, batch_size, place, samples=samples).peak
    run = _Run(job, samples, dtype, batch_size, place, losses=False)
    reduced = max((a.kept for a in alone.outer), default=0) * dtype.itemsize
    # Those of the original after its last layer are never offloaded.
    states = (3 if place == "device" else 1) * run.stream(held_out)
    logits = job.plan.seq_len * architecture.vocab * (2 * batch_size * dtype.itemsize + 4 * 4)
    return one + architecture.layers * run.weights + run.tables + reduced + states + logits


def generating_memory(job: Job, dtype: torch.dtype, batch_size: int) -> int:
    """Return the bytes that generating text takes: the whole model, a batch's KV cache and its last logits.

    One layer's keys and values are held twice while they grow; the logits once in ``dtype`` and four times in float64.
    """
    architecture, run = job.reader.architecture, dtype.itemsize
    keys = 2 * batch_size * job.plan.seq_len * architecture.kv_heads * architecture.head_dim
    logits = batch_size * architecture.vocab * (run + 4 * 8)
    return (architecture.total_parameters + (architecture.layers + 1) * keys) * run + logits


def _eager(run: _Run, blocks: int) -> int:
    """Return the bytes of the attention scores of ``blocks``, if they are held: mask, soft cap, float32 softmax."""
    if run.architecture.family.sdpa:
        return 0
    each = 4 * run.dtype.itemsize + 8
    return blocks * run.architecture.heads * run.job.plan.seq_len**2 * each


def _sweep(run: _Run) -> int:
    """Return the bytes of the backward sweep: a batch of logits, or a layer with the activations kept for gradients."""
    architecture, each = run.architecture, run.dtype.itemsize
    tokens = min(run.batch_size, run.gradient_samples) * run.job.plan.seq_len
    rows = min(logit_rows(architecture.vocab), run.job.plan.seq_len)
    head = run.tables + rows * architecture.vocab * (12 + 3 * each) + 8 * tokens * architecture.hidden
    width = architecture.matrices[architecture.family.mlp_output].columns
    activations = tokens * (architecture.hidden * (14 * 4 + 10 * each) + width * 8 * each)
    activations += 2 * _eager(run, min(run.batch_size, run.gradient_samples))
    return max(head, run.weights + 2 * max(map(run.gradient, run.job.plan.layers)) + activations)


def _tables(run: _Run) -> int:
    """Return the bytes of embedding and head: as run, as solved in float64, or with logits to fit their scale."""
    architecture, each = run.architecture, run.dtype.itemsize
    work = run.tables + run.stream(4 * run.batch_size)
    for a in run.job.plan.outer:  # the table, its product with C, its change and the change squared
        table, stored = architecture.outer[a.target].parameters, run.job.reader.weight(a.target, None).dtype
        work = max(work, (stored.itemsize + 32) * table + 32 * a.kept + 48 * architecture.hidden**2)
    if run.job.plan.plan.scales:
        rows = min(run.held_out * run.job.plan.seq_len, max(CHUNK_BYTES // (4 * architecture.vocab), 1))
        heads = run.tables + each * sum(a.kept for a in run.job.plan.outer)
        work = max(work, heads + rows * architecture.vocab * (2 * each + 8 * 4))
    return work


def _layer(run: _Run, layer: LayerPlan) -> int:
    """Return the bytes of a layer's weights and the largest step of its compression."""
    architecture, each = run.architecture, run.dtype.itemsize
    width = architecture.matrices[architecture.family.mlp_output].columns
    projections = layer.targets - {"qk", "ov", "mlp"}
    token = architecture.hidden * (6 * 4 + 6 * each) + width * (3 * each + 16 if projections else 7 * each)
    activations = run.batch_size * run.job.plan.seq_len * token + _eager(run, run.batch_size)
    if not layer.assignments:
        return run.weights + activations
    moments = sum(4 * architecture.site_width(site) ** 2 for site in sites_needed(architecture, layer))
    sampled = 0
    if "attention_samples" in collectors_needed(layer):
        queries = min(SAMPLES, run.samples * QUERIES * architecture.geometry.group)
        sampled = queries * architecture.head_dim**2  # of a key head
        moments += 4 * sampled * architecture.kv_heads
    # Gradient moments on the GPU are already counted for all layers.
    gradient = 0 if run.place == "device" else run.gradient(layer)
    kept = sum(a.kept for a in layer.assignments)
    reduced = 2 * kept * run.stored_bytes
    if not run.shared:  # the reduced layer as run, and one layer for each target measured alone
        rest = architecture.layer_parameters - sum(a.whole for a in layer.assignments)
        reduced += (rest + kept + len(layer.assignments) * architecture.layer_parameters) * each
    scores = 20 * architecture.heads * run.job.plan.seq_len**2 if layer.targets & {"qk"} else 0
    solves = []
    for a in layer.assignments:  # in float64
        shapes = Shapes(architecture.targets[a.target], architecture.geometry, sampled)
        solves.append(solver_of(a).memory(shapes, a.size, a.options))
    work = [
        2 * moments + gradient + activations,
        moments + gradient + 8 * kept + max(solves),
        moments + gradient + reduced + activations + scores,
    ]
    if run.refits:
        hidden, biased = architecture.hidden, architecture.matrices[architecture.family.mlp_output].bias
        for n in _refit_widths(architecture, layer).values():
            sums = 12 * n * (n + hidden) + activations  # of a batch
            # Float32 sums and means of fitted and held-out blocks, and float64 ridge regressions: the moment, centred
            # if there is a bias, damped and factored.
            fit = 16 * n**2 + 8 * hidden * n
            fit += 8 * ((3 if biased else 2) * n**2 + column_part(n) + 6 * hidden * n)
            work.append(reduced + max(fit, sums))
    return run.weights + max(work)


def _refit_widths(architecture: Architecture, layer: LayerPlan) -> dict[str, int]:
    """Return the input width of each refitted linear, by the half of the layer that it ends."""
    inner = {a.target: inner_width(architecture, a) for a in layer.assignments}
    family = architecture.family
    by_component = {
        "attention": architecture.heads * inner.get("ov", architecture.head_dim),
        "mlp": inner.get("mlp", architecture.matrices[family.mlp_output].columns),
    }
    touched = [half for half in family.halves if layer.targets & half.targets]
    return {half.name: inner.get(half.output, by_component[half.name]) for half in touched}
