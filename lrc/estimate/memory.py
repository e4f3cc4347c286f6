"""An upper bound of the GPU memory that a compression takes, from shapes alone, by where hidden states wait.

The bound is the largest of the sweep for gradients, the embedding and the head, and for every layer its moments, its
solves, its measurements and its refits. Hidden states and gradient moments that wait on the GPU are added; of those
that wait elsewhere, a few batches. Workspaces of the linear algebra library and fragments of the allocator are not
counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lrc.compression.logit_scale import CHUNK_BYTES
from lrc.compression.refit import held_out_blocks
from lrc.estimate.workspace import refit_widths, refit_work, solve_work
from lrc.families import Architecture
from lrc.moments.attention import QUERIES
from lrc.moments.attention_samples import SAMPLES
from lrc.plan.job import Job
from lrc.plan.resolved import LayerPlan
from lrc.run.offload import Place
from lrc.walk.backward import logit_rows, states_held, stride
from lrc.walk.needs import collectors_needed, gradients_needed, sites_needed

HELD_OUT_SAMPLES = 8  # blocks of held-out text that sizes are measured on by default
ASSUMED_SAMPLES = 128  # where the plan takes all blocks of a text, which nobody has read yet


@dataclass(frozen=True)
class Memory:
    """The most bytes that a run is expected to take on the GPU, with hidden states that wait on ``place``.

    ``states``: bytes of hidden states; ``gradients``: bytes of the layers' inputs and gradient moments, 0 where no
    method reads any. Both are in ``peak`` only where ``place`` is the device. ``samples`` and ``batch_size`` are in
    blocks.
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
    """A compression to bound; ``losses``: gradients of all targets are read, as some allocations do."""

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

    @property
    def shared(self) -> bool:
        """Whether weights are run as they are stored, in the same tensors."""
        return self.job.reader.dtype == self.dtype

    @property
    def weights(self) -> int:
        """Bytes of a layer: as stored and as run."""
        each = self.dtype.itemsize + (0 if self.shared else self.job.reader.dtype.itemsize)
        return self.architecture.layer_parameters * each

    @property
    def tables(self) -> int:
        """Bytes of the weights outside the layers, as run."""
        inside = self.architecture.layers * self.architecture.layer_parameters
        return (self.architecture.total_parameters - inside) * self.dtype.itemsize

    @property
    def gradient_samples(self) -> int:
        return min(self.job.plan.plan.calibration.gradient_samples, self.samples)

    @property
    def held_out(self) -> int:
        return int(held_out_blocks(self.samples).sum()) or self.samples

    def stream(self, samples: int) -> int:
        """Bytes of the hidden states of so many blocks, wherever they are."""
        return 4 * samples * self.job.plan.seq_len * self.architecture.hidden

    def states(self, layer: LayerPlan) -> int:
        """Bytes of hidden states while a layer is compressed: the two streams, that between the layer's halves, the
        blocks that reductions are measured on, and what the refitted output of attention reads.
        """
        streams = self.stream(self.samples) * (2 if self.refits or self.job.plan.outer else 1)
        if not layer.assignments:
            return streams
        between = self.stream(self.samples) if self.refits else 0
        width = refit_widths(self.architecture, layer).get("attention", 0) if self.refits else 0
        read = width * self.samples * self.job.plan.seq_len * self.dtype.itemsize
        return streams + between + self.stream(self.held_out) + read

    def gradient(self, layer: LayerPlan) -> int:
        """Bytes of the gradient moments of one layer."""
        architecture, heads = self.architecture, self.architecture.geometry
        wanted = gradients_needed(architecture, layer, losses=self.losses)
        width = heads.head_dim if heads.rotary == "none" else heads.head_dim // 2
        outputs = sum(architecture.matrices[role].rows ** 2 for role in wanted.roles)
        return 4 * (outputs + (heads.kv_heads * width**2 if wanted.queries else 0))

    def here(self, held: int) -> int:
        """Bytes on the GPU of hidden states that take ``held`` bytes where they wait."""
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
    """Return the GPU memory that ``lrc compress`` takes at most: layers in ``dtype``, ``batch_size`` blocks at once.

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
    """Bytes that ``lrc.allocation.sensitivity`` takes on ``samples`` blocks of calibration and ``held_out`` others:
    those of a compression without refit, the whole model, a reduced table, the held-out states twice and the logits of
    a batch. Hidden states wait on ``place``.
    """
    architecture, plan, seq_len = job.reader.architecture, job.plan.plan, job.plan.seq_len
    alone = replace(job.plan, plan=plan.model_copy(update={"refit": "none"}), outer=job.plan.unsized(None))
    one = estimate_memory(replace(job, plan=alone), dtype, batch_size, place, samples=samples).peak
    stored, run = job.reader.dtype.itemsize, dtype.itemsize
    decoder = architecture.layers * architecture.layer_parameters
    weights = decoder * (stored if job.reader.dtype == dtype else stored + run)
    largest = max((a.kept for a in alone.outer), default=0)
    tables = (architecture.total_parameters - decoder + largest) * run
    states = (2 * 4 * held_out * seq_len * architecture.hidden) if place == "device" else 0
    logits = seq_len * architecture.vocab * (batch_size * run + 2 * 4)
    return one + weights + tables + states + logits


def generating_memory(job: Job, dtype: torch.dtype, batch_size: int) -> int:
    """Bytes that synthetic text takes: the whole model, keys and values of a batch of blocks with one layer's twice
    while they grow, and its last logits, once as they come and four times in float64.
    """
    architecture, run = job.reader.architecture, dtype.itemsize
    keys = 2 * batch_size * job.plan.seq_len * architecture.kv_heads * architecture.head_dim
    logits = batch_size * architecture.vocab * (run + 4 * 8)
    return (architecture.total_parameters + (architecture.layers + 1) * keys) * run + logits


def _sweep(run: _Run) -> int:
    """The sweep back: a batch of the head's logits, or a layer with what differentiating keeps of a token."""
    architecture, each = run.architecture, run.dtype.itemsize
    tokens = min(run.batch_size, run.gradient_samples) * run.job.plan.seq_len
    rows = min(logit_rows(architecture.vocab), run.job.plan.seq_len)
    head = run.tables + rows * architecture.vocab * (12 + 3 * each) + 8 * tokens * architecture.hidden
    width = architecture.matrices[architecture.family.mlp_output].columns
    activations = tokens * (architecture.hidden * (14 * 4 + 10 * each) + width * 8 * each)
    return max(head, run.weights + 2 * max(map(run.gradient, run.job.plan.layers)) + activations)


def _tables(run: _Run) -> int:
    """The embedding and the head: as run, as solved in float64, and with a chunk of logits to find their scale."""
    architecture, each = run.architecture, run.dtype.itemsize
    work = run.tables + run.stream(4 * run.batch_size)
    for a in run.job.plan.outer:  # the table, that times C, changed and squared
        table = architecture.outer[a.target].parameters
        work = max(
            work, (run.job.reader.dtype.itemsize + 32) * table + 32 * a.kept + 48 * architecture.hidden**2
        )
    if run.job.plan.plan.scales:
        rows = min(run.held_out * run.job.plan.seq_len, max(CHUNK_BYTES // (4 * architecture.vocab), 1))
        heads = run.tables + each * sum(a.kept for a in run.job.plan.outer)
        work = max(work, heads + rows * architecture.vocab * (2 * each + 6 * 4))
    return work


def _layer(run: _Run, layer: LayerPlan) -> int:
    """The weights of a layer and the most that is beside them while it is compressed."""
    architecture, each = run.architecture, run.dtype.itemsize
    width = architecture.matrices[architecture.family.mlp_output].columns
    projections = layer.targets - {"qk", "ov", "mlp"}
    token = architecture.hidden * (6 * 4 + 6 * each) + width * (3 * each + 16 if projections else 7 * each)
    activations = run.batch_size * run.job.plan.seq_len * token
    if not layer.assignments:
        return run.weights + activations
    moments = sum(4 * architecture.site_width(site) ** 2 for site in sites_needed(architecture, layer))
    sampled = 0
    if "attention_samples" in collectors_needed(layer):
        queries = min(SAMPLES, run.samples * QUERIES * architecture.geometry.group)
        sampled = queries * architecture.head_dim**2  # of a key head
        moments += 4 * sampled * architecture.kv_heads
    # Gradient moments of this layer: those that wait on the GPU are counted with all others.
    gradient = 0 if run.place == "device" else run.gradient(layer)
    kept = sum(a.kept for a in layer.assignments)
    reduced = 2 * kept * run.job.reader.dtype.itemsize
    if not run.shared:  # the reduced layer as run, and one for each target that is measured alone
        rest = architecture.layer_parameters - sum(a.whole for a in layer.assignments)
        reduced += (rest + kept + len(layer.assignments) * architecture.layer_parameters) * each
    scores = 20 * architecture.heads * run.job.plan.seq_len**2 if layer.targets & {"qk"} else 0
    work = [
        2 * moments + gradient + activations,
        moments + gradient + 8 * kept + max(solve_work(architecture, a, sampled) for a in layer.assignments),
        moments + gradient + reduced + activations + scores,
    ]
    if run.refits:  # a batch with sums that are being added to, then the fit
        for n in refit_widths(architecture, layer).values():
            sums = 12 * n * (n + architecture.hidden) + activations
            work.append(reduced + max(refit_work(architecture, n), sums))
    return run.weights + max(work)
