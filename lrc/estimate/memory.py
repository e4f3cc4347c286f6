"""How much memory a compression takes on a GPU, and what waits elsewhere, worked out from shapes.

The count follows the loop stage by stage. Between two layers only hidden states are held; within a layer

    gradients inputs + weights + 2 · G + activations, or head + logits      before the streams are there
    observe   states + weights + 2 · moments + activations          sums, and the means made of them
    solve     states + weights + moments + G + solutions + work     work: of the largest solve
    measure   states + weights + moments + reduced + activations + attention
    refit     states + read + weights + reduced + work              work: of the larger refit, or its sums and a batch

and after the last, with the residual refit,

    scale     streams + those of the blocks that choose + heads + a chunk of logits, six times in float32

with T tokens of calibration, t of one batch, n_i the widths of the sites observed, hidden size h, MLP width f, s and c
bytes of a weight as stored and as run:

    streams      4 T h, twice with the residual refit: original and compressed; 0 where states wait elsewhere
    states       streams, once more 4 T h with the refit, for the stream between the halves, and the blocks on which
                 reductions are measured as they were before the layer
    read         what the attention's output projection reads of all, c for each, where it is refitted; 0 as above
    weights      (s + c) · weights of a layer; s alone where s = c, as tensors are then shared
    moments      4 Σ n_i²
    solutions    8 · kept weights: what the methods return is float64
    reduced      the reduced layer, and one layer for each target that is measured alone
    outer        streams + tables of the embedding or head in float64, where they are factorized; where they are one,
                 two streams + a layer as it passes before that
    attention    five float32 matrices of heads × seq_len × seq_len, for the divergence of one block
    sums         of a refit, in float32, kept twice: for the blocks fitted to and for those held out
    work         ``lrc.estimate.workspace``, float64
    G            4 Σ m_i² of the outputs whose gradients the methods read; of the layers that are not solved yet beside
                 everything from the sweep on, 0 as above
    inputs       of layers, kept for the sweep back (``lrc.walk.backward``): 4 h for each token of ``gradient_samples``
                 blocks, 0 as above

Hidden states that wait elsewhere come back a batch at a time, a few of 4 t h.

It is an estimate: workspaces of the linear algebra library and fragments of the allocator are not in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from lrc.compression.logit_scale import CHUNK_BYTES
from lrc.compression.refit import held_out_blocks
from lrc.estimate.workspace import refit_widths, refit_work, solve_work
from lrc.families import Architecture
from lrc.moments.attention import QUERIES, SAMPLES
from lrc.plan.job import Job
from lrc.plan.resolved import LayerPlan
from lrc.run.offload import Place
from lrc.walk.backward import logit_rows, states_held, stride
from lrc.walk.needs import collectors_needed, gradients_needed, sites_needed

ASSUMED_SAMPLES = 128  # where the plan takes all blocks of a text, which nobody has read yet


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on the GPU: the peak, the stage it falls in, and what every stage holds, of which ``states`` are
    hidden states at most, or would be elsewhere.

    ``gradients``: bytes that inputs of layers and gradient moments take where states wait, 0 where no method reads
    any. ``samples`` blocks of calibration, ``batch_size`` blocks at once and states that wait on ``place`` are what was
    assumed.
    """

    peak: int
    stage: str
    stages: dict[str, int]
    states: int
    gradients: int
    samples: int
    batch_size: int
    dtype: str
    place: Place

    def beside(self, stage: str, held: int) -> Memory:
        """The same with a stage more."""
        stages = {**self.stages, stage: held}
        most = max(stages, key=stages.__getitem__)
        return replace(self, peak=stages[most], stage=most, stages=stages)


@dataclass(frozen=True)
class _Run:
    """A compression whose bytes are counted; ``losses``: gradients of all targets are read for an allocation."""

    job: Job
    samples: int
    dtype: torch.dtype
    batch_size: int
    place: Place
    losses: bool = False

    @property
    def architecture(self) -> Architecture:
        return self.job.reader.architecture

    @property
    def seq_len(self) -> int:
        return self.job.plan.seq_len

    @property
    def refits(self) -> bool:
        return self.job.plan.plan.refit == "residual"

    @property
    def stored(self) -> int:
        """Bytes of a weight as stored."""
        return self.job.reader.dtype.itemsize

    @property
    def run(self) -> int:
        """Bytes of a weight as run."""
        return self.dtype.itemsize

    @property
    def weights(self) -> int:
        """Bytes of a layer: as stored and as run, once where these are the same tensors."""
        each = self.stored if self.job.reader.dtype == self.dtype else self.stored + self.run
        return self.architecture.layer_parameters * each

    @property
    def tables(self) -> int:
        """Weights outside the layers."""
        return (
            self.architecture.total_parameters - self.architecture.layers * self.architecture.layer_parameters
        )

    def stream(self, samples: int) -> int:
        """Bytes of the hidden states of so many blocks, wherever they are."""
        return 4 * samples * self.seq_len * self.architecture.hidden

    def gradient(self, layer: LayerPlan) -> int:
        """Bytes of the gradient moments of one layer."""
        architecture, heads = self.architecture, self.architecture.geometry
        wanted = gradients_needed(architecture, layer, losses=self.losses)
        width = heads.head_dim if heads.rotary == "none" else heads.head_dim // 2
        outputs = sum(architecture.matrices[role].rows ** 2 for role in wanted.roles)
        return 4 * (outputs + (heads.kv_heads * width**2 if wanted.queries else 0))

    def waiting(self, held: int) -> int:
        """What states that take ``held`` bytes take of the device."""
        return held if self.place == "device" else min(held, 4 * self.stream(self.batch_size))

    def gradients(self, layers: Iterable[LayerPlan]) -> int:
        """What the gradient moments of layers take of the device while they wait."""
        return sum(self.gradient(layer) for layer in layers) if self.place == "device" else 0


def estimate_memory(
    job: Job,
    dtype: torch.dtype,
    batch_size: int,
    place: Place = "device",
    *,
    samples: int | None = None,
    losses: bool = False,
) -> Memory:
    """Memory that ``lrc compress`` takes on a GPU: layers run in ``dtype``, ``batch_size`` blocks at once, and hidden
    states wait on ``place``. ``samples``: calibration blocks (default: the plan's, where it says how many). ``losses``:
    gradients of all targets are read, as some allocations do before.
    """
    asked = job.plan.plan.calibration.samples
    samples = samples or (ASSUMED_SAMPLES if asked == "all" else asked)
    run = _Run(job, samples, dtype, min(batch_size, samples), place, losses)
    layers, gradients = job.plan.layers, _gradients_waiting(run)
    stages = {"embed": _embed(run) + run.gradients(layers)}
    if gradients:
        stages["gradients"] = _gradients(run)
    if job.plan.outer:
        stages["outer"] = _outer(run) + run.gradients(layers)
    later = run.gradients(layers)
    for layer in layers:
        later -= run.gradients([layer])
        for stage, held in _layer(run, layer).items():
            stages[stage] = max(stages.get(stage, 0), held + later)
    if job.plan.plan.scales:
        stages["scale"] = _scale(run)
    states = max((_states(run, layer) + _read(run, layer) for layer in job.plan.layers), default=0)
    stage = max(stages, key=lambda name: stages[name])
    name = str(dtype).removeprefix("torch.")
    return Memory(stages[stage], stage, stages, states, gradients, samples, run.batch_size, name, place)


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


def _embed(run: _Run) -> int:
    parted = run.refits and any(a.target == "embed" for a in run.job.plan.outer)
    streams = run.waiting(run.stream(run.samples) * (2 if parted else 1))
    return streams + run.stream(4 * run.batch_size) + run.tables * run.run


def _gradient_samples(run: _Run) -> int:
    return min(run.job.plan.plan.calibration.gradient_samples, run.samples)


def _gradients(run: _Run) -> int:
    architecture, samples = run.architecture, _gradient_samples(run)
    tokens = min(run.batch_size, samples) * run.seq_len
    rows, hidden = min(logit_rows(architecture.vocab), run.seq_len), architecture.hidden
    head = run.tables * run.run + rows * architecture.vocab * (12 + 3 * run.run) + 2 * 4 * tokens * hidden
    sums = 2 * max(run.gradient(layer) for layer in run.job.plan.layers)
    width = architecture.matrices[architecture.family.mlp_output].columns
    # What differentiating keeps of a token, and what comes back.
    activations = tokens * (hidden * (14 * 4 + 10 * run.run) + width * 8 * run.run)
    held = _gradients_waiting(run) if run.place == "device" else run.waiting(run.stream(samples))
    work = max(head, run.weights + sums + activations)
    return max(_embed(replace(run, samples=samples)), held + work)


def _gradients_waiting(run: _Run) -> int:
    """Inputs of layers, and the gradient moments of all; 0 where none are needed."""
    moments = sum(run.gradient(layer) for layer in run.job.plan.layers)
    layers, state = run.architecture.layers, run.stream(_gradient_samples(run))
    return moments + states_held(layers, stride(layers, state)) * state if moments else 0


def _outer(run: _Run) -> int:
    """Streams, and tables that a solve outside the layers holds in float64: as it was, times C, changed and squared.

    A tied embedding is solved when a second stream has been through all layers, as they were.
    """
    architecture, stream = run.architecture, run.stream(run.samples)
    work, ahead = 0, 0
    if architecture.tied:
        layer = _layer(run, LayerPlan(0, ()))["pass"]
        ahead = layer - run.waiting(_streams(run)) + run.waiting(2 * stream)
    for a in run.job.plan.outer:
        table, pair = architecture.outer[a.target], a.kept
        work = max(
            work, (run.stored + 4 * 8) * table.parameters + 4 * 8 * pair + 8 * 6 * architecture.hidden**2
        )
    return max(run.waiting(_streams(run)) + work, ahead)


def _scale(run: _Run) -> int:
    architecture = run.architecture
    held = int(held_out_blocks(run.samples).sum())
    streams = run.waiting(2 * run.stream(run.samples + held))
    rows = min(held * run.seq_len, max(CHUNK_BYTES // (4 * architecture.vocab), 1))
    logits = rows * architecture.vocab * (2 * run.run + 6 * 4)
    heads = architecture.vocab * architecture.hidden
    heads += sum(a.kept for a in run.job.plan.outer if architecture.tied or a.target == "lm_head")
    return streams + heads * run.run + logits


def _streams(run: _Run) -> int:
    """Bytes of the streams between two layers, wherever they are."""
    return run.stream(run.samples) * (2 if run.refits else 1)


def _states(run: _Run, layer: LayerPlan) -> int:
    """Bytes of hidden states while a layer is done, wherever they are."""
    if not layer.assignments:
        return _streams(run)
    measured = int(held_out_blocks(run.samples).sum()) or run.samples
    between = run.stream(run.samples) if run.refits else 0
    return _streams(run) + between + run.stream(measured)


def _read(run: _Run, layer: LayerPlan) -> int:
    """Bytes of what the attention's output projection reads of all blocks, where it is refitted."""
    width = refit_widths(run.architecture, layer).get("attention", 0) if run.refits else 0
    return width * run.samples * run.seq_len * run.run


def _layer(run: _Run, layer: LayerPlan) -> dict[str, int]:
    architecture = run.architecture
    shared = run.job.reader.dtype == run.dtype
    activations = run.batch_size * run.seq_len * _token_bytes(architecture, layer, run.run)
    base = run.waiting(_states(run, layer)) + run.weights
    if not layer.assignments:
        return {"pass": base + activations}
    kept = sum(a.kept for a in layer.assignments)
    moments = sum(4 * architecture.site_width(site) ** 2 for site in sites_needed(architecture, layer))
    sampled = 0
    if "attention_samples" in collectors_needed(layer):
        queries = min(SAMPLES, run.samples * QUERIES * architecture.geometry.group)
        sampled = queries * architecture.head_dim**2  # of a key head
        moments += 4 * sampled * architecture.kv_heads
    gradients, solutions = run.gradient(layer), 8 * kept
    alone = len(layer.assignments) * (0 if shared else architecture.layer_parameters * run.run)
    rest = architecture.layer_parameters - sum(a.whole for a in layer.assignments)
    reduced = 2 * kept * run.stored + (0 if shared else (rest + kept) * run.run) + alone
    attention = 20 * architecture.heads * run.seq_len**2 if layer.targets & {"qk"} else 0
    own = gradients if run.place == "device" else 0
    stages = {
        "observe": base + own + 2 * moments + activations,
        "solve": base
        + moments
        + gradients
        + solutions
        + max(solve_work(architecture, a, sampled) for a in layer.assignments),
        "measure": base + moments + gradients + reduced + activations + attention,
    }
    if run.refits:
        # Sums, and what is added to one of the two, while a batch runs; then those and the solve's.
        work = max(
            max(refit_work(architecture, n), 12 * n * (n + architecture.hidden) + activations)
            for n in refit_widths(architecture, layer).values()
        )
        held = run.waiting(_states(run, layer) + _read(run, layer))
        stages["refit"] = held + run.weights + reduced + work
    return stages


def _token_bytes(architecture: Architecture, layer: LayerPlan, run: int) -> int:
    """Activations held for one token while a layer runs and is compared with its reductions."""
    hidden, width = architecture.hidden, architecture.matrices[architecture.family.mlp_output].columns
    projections = layer.targets - {"qk", "ov", "mlp"}
    return hidden * (6 * 4 + 6 * run) + width * (3 * run + 16 if projections else 7 * run)


def _width(architecture: Architecture, site: str) -> int:
    """Size of the activations at a site."""
    roles: Iterable[str] = architecture.matrices
    return next(
        architecture.matrices[role].columns for role in roles if architecture.family.site(role) == site
    )
