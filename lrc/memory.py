"""How much memory a compression takes on a GPU, and for gradients on the host, worked out from shapes.

The count follows ``lrc.compressor`` stage by stage. Between two layers only hidden states are held; within a layer

    gradients weights + 2 · G + activations, or head + logits       before the streams are there; ``lrc.gradients``
    observe   states + weights + 2 · moments + activations          sums, and the means made of them
    solve     states + weights + moments + G + solutions + work     work: of the largest solve
    measure   states + weights + moments + reduced + activations + attention
    refit     states + read + weights + reduced + work              work: of the larger refit, or its sums and a batch

and after the last, with the residual refit,

    scale     streams + those of the blocks that choose + heads + a chunk of logits, six times in float32

with T tokens of calibration, t of one batch, n_i the widths of the sites observed, hidden size h, MLP width f, s and c
bytes of a weight as stored and as run:

    streams      4 T h, twice with the residual refit: original and compressed
    states       streams, once more 4 T h with the refit, for the stream between the halves, and the blocks on which
                 reductions are measured as they were before the layer
    read         what the attention's output projection reads of all blocks, c for each, where it is refitted
    weights      (s + c) · weights of a layer; s alone where s = c, as tensors are then shared
    moments      4 Σ n_i²
    solutions    8 · kept weights: what the methods return is float64
    reduced      the reduced layer, and one layer for each target that is measured alone
    outer        streams + tables of the embedding or head in float64, where they are factorized; where they are one,
                 two streams + a layer as it passes before that
    attention    five float32 matrices of heads × seq_len × seq_len, for the divergence of one block
    sums         of a refit, in float32, kept twice: for the blocks fitted to and for those held out
    work         ``_solve_work`` and ``_refit_work``, float64
    G            4 Σ m_i² of the outputs whose gradients the methods read

On the host, where gradients are read, lie inputs of layers, 4 h for each token of ``gradient_samples`` blocks, and the
G of all layers.

It is an estimate: workspaces of the linear algebra library and fragments of the allocator are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from lrc.families import Architecture
from lrc.gradients import logit_rows, states_held, stride
from lrc.job import Job
from lrc.methods import methods
from lrc.moments.attention import QUERIES, SAMPLES
from lrc.plan.resolved import Assignment, LayerPlan
from lrc.refit import held_out_blocks
from lrc.scale import CHUNK_BYTES
from lrc.solve import collectors_needed, gradients_needed, sites_needed

ASSUMED_SAMPLES = 128  # where the plan takes all blocks of a text, which nobody has read yet
_ATTENTION = {"q", "k", "v", "o", "qk", "ov"}


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on the GPU: the peak, the stage it falls in, and what every stage holds.

    ``gradients_host``: bytes on the host that gradients take, 0 where no method reads them. ``samples`` blocks of
    calibration and ``batch_size`` blocks at once are what was assumed.
    """

    peak: int
    stage: str
    stages: dict[str, int]
    gradients_host: int
    samples: int
    batch_size: int
    dtype: str


def estimate_memory(job: Job, dtype: torch.dtype, batch_size: int) -> Memory:
    """Memory that ``lrc compress`` takes on a GPU with layers run in ``dtype``, ``batch_size`` blocks at once."""
    asked = job.plan.plan.calibration.samples
    samples = ASSUMED_SAMPLES if asked == "all" else asked
    batch_size = min(batch_size, samples)
    stages = {"embed": _embed(job, samples, dtype, batch_size)}
    if gradients_host := _gradients_host(job, samples):
        stages["gradients"] = _gradients(job, samples, dtype, batch_size)
    if job.plan.outer:
        stages["outer"] = _outer(job, samples, dtype, batch_size)
    for layer in job.plan.layers:
        for stage, held in _layer(job, layer, samples, dtype, batch_size).items():
            stages[stage] = max(stages.get(stage, 0), held)
    if job.plan.plan.scales:
        stages["scale"] = _scale(job, samples, dtype)
    stage = max(stages, key=lambda name: stages[name])
    name = str(dtype).removeprefix("torch.")
    return Memory(stages[stage], stage, stages, gradients_host, samples, batch_size, name)


def measuring_memory(job: Job, dtype: torch.dtype, batch_size: int, samples: int, held_out: int) -> int:
    """Bytes that ``lrc.allocation.sensitivity`` takes on ``samples`` blocks of calibration and ``held_out`` others:
    those of a compression without refit, the whole model, a reduced table, the held-out states twice and the logits of
    a batch.
    """
    architecture, plan, seq_len = job.reader.architecture, job.plan.plan, job.plan.seq_len
    calibration = plan.calibration.model_copy(update={"samples": samples})
    alone = replace(
        job.plan,
        plan=plan.model_copy(update={"refit": "none", "calibration": calibration}),
        outer=job.plan.unsized(None),
    )
    one = estimate_memory(replace(job, plan=alone), dtype, batch_size).peak
    stored, run = job.reader.dtype.itemsize, dtype.itemsize
    decoder = architecture.layers * architecture.layer_parameters
    weights = decoder * (stored if job.reader.dtype == dtype else stored + run)
    largest = max((a.kept for a in alone.outer), default=0)
    tables = (architecture.total_parameters - decoder + largest) * run
    states = 2 * 4 * held_out * seq_len * architecture.hidden
    logits = seq_len * architecture.vocab * (batch_size * run + 2 * 4)
    return one + weights + tables + states + logits


def generating_memory(job: Job, dtype: torch.dtype, batch_size: int) -> int:
    """Bytes that ``lrc.synthetic`` takes: the whole model, keys and values of a batch of blocks with one layer's twice
    while they grow, and its last logits, once as they come and four times in float64.
    """
    architecture, run = job.reader.architecture, dtype.itemsize
    keys = 2 * batch_size * job.plan.seq_len * architecture.kv_heads * architecture.head_dim
    logits = batch_size * architecture.vocab * (run + 4 * 8)
    return (architecture.total_parameters + (architecture.layers + 1) * keys) * run + logits


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _embed(job: Job, samples: int, dtype: torch.dtype, batch_size: int) -> int:
    architecture = job.reader.architecture
    parted = job.plan.plan.refit == "residual" and any(a.target == "embed" for a in job.plan.outer)
    tokens = (samples * (2 if parted else 1) + 4 * batch_size) * job.plan.seq_len
    tables = architecture.total_parameters - architecture.layers * architecture.layer_parameters
    return 4 * tokens * architecture.hidden + tables * dtype.itemsize


def _gradient_samples(job: Job, samples: int) -> int:
    return min(job.plan.plan.calibration.gradient_samples, samples)


def _gradients(job: Job, samples: int, dtype: torch.dtype, batch_size: int) -> int:
    architecture, run, stored = job.reader.architecture, dtype.itemsize, job.reader.dtype.itemsize
    samples = _gradient_samples(job, samples)
    tokens = min(batch_size, samples) * job.plan.seq_len
    rows, hidden = min(logit_rows(architecture.vocab), job.plan.seq_len), architecture.hidden
    tables = (architecture.total_parameters - architecture.layers * architecture.layer_parameters) * run
    head = tables + rows * architecture.vocab * (12 + 3 * run) + 2 * 4 * tokens * hidden
    weights = architecture.layer_parameters * (stored if job.reader.dtype == dtype else stored + run)
    sums = 2 * max(_gradient_bytes(architecture, layer) for layer in job.plan.layers)
    width = architecture.matrices[architecture.family.mlp_output].columns
    # What differentiating keeps of a token, and what comes back.
    activations = tokens * (hidden * (14 * 4 + 10 * run) + width * 8 * run)
    return max(_embed(job, samples, dtype, batch_size), head, weights + sums + activations)


def _gradients_host(job: Job, samples: int) -> int:
    """Inputs of layers, and the gradient moments of all; 0 where none are needed."""
    architecture = job.reader.architecture
    moments = sum(_gradient_bytes(architecture, layer) for layer in job.plan.layers)
    state = 4 * _gradient_samples(job, samples) * job.plan.seq_len * architecture.hidden
    layers = architecture.layers
    return moments + states_held(layers, stride(layers, state)) * state if moments else 0


def _gradient_bytes(architecture: Architecture, layer: LayerPlan) -> int:
    """Gradient moments of one layer."""
    wanted, heads = gradients_needed(architecture, layer), architecture.geometry
    width = heads.head_dim if heads.rotary == "none" else heads.head_dim // 2
    outputs = sum(architecture.matrices[role].rows ** 2 for role in wanted.roles)
    return 4 * (outputs + (heads.kv_heads * width**2 if wanted.queries else 0))


def _outer(job: Job, samples: int, dtype: torch.dtype, batch_size: int) -> int:
    """Streams, and tables that a solve outside the layers holds in float64: as it was, times C, changed and squared.

    A tied embedding is solved when a second stream has been through all layers, as they were.
    """
    architecture, stored = job.reader.architecture, job.reader.dtype.itemsize
    stream = 4 * samples * job.plan.seq_len * architecture.hidden
    refits, work, ahead = job.plan.plan.refit == "residual", 0, 0
    if architecture.tied:
        ahead = _layer(job, LayerPlan(0, ()), samples, dtype, batch_size)["pass"] + (0 if refits else stream)
    for a in job.plan.outer:
        table, pair = architecture.outer[a.target], a.kept
        work = max(work, (stored + 4 * 8) * table.parameters + 4 * 8 * pair + 8 * 6 * architecture.hidden**2)
    return max(stream * (2 if refits else 1) + work, ahead)


def _scale(job: Job, samples: int, dtype: torch.dtype) -> int:
    architecture, seq_len = job.reader.architecture, job.plan.seq_len
    held = int(held_out_blocks(samples).sum())
    streams = 2 * 4 * (samples + held) * seq_len * architecture.hidden
    rows = min(held * seq_len, max(CHUNK_BYTES // (4 * architecture.vocab), 1))
    logits = rows * architecture.vocab * (2 * dtype.itemsize + 6 * 4)
    heads = architecture.vocab * architecture.hidden
    heads += sum(a.kept for a in job.plan.outer if architecture.tied or a.target == "lm_head")
    return streams + heads * dtype.itemsize + logits


def _layer(job: Job, layer: LayerPlan, samples: int, dtype: torch.dtype, batch_size: int) -> dict[str, int]:
    architecture, seq_len = job.reader.architecture, job.plan.seq_len
    stored, run = job.reader.dtype.itemsize, dtype.itemsize
    shared = job.reader.dtype == dtype
    refits = job.plan.plan.refit == "residual"
    stream = 4 * samples * seq_len * architecture.hidden
    streams, weights = (
        stream * (2 if refits else 1),
        architecture.layer_parameters * (stored if shared else stored + run),
    )
    tokens = batch_size * seq_len
    activations = tokens * _token_bytes(architecture, layer, run)
    if not layer.assignments:
        return {"pass": streams + weights + activations}
    kept = sum(a.kept for a in layer.assignments)
    moments = sum(4 * architecture.site_width(site) ** 2 for site in sites_needed(architecture, layer))
    sampled = 0
    if "attention_samples" in collectors_needed(layer):
        queries = min(SAMPLES, samples * QUERIES * architecture.geometry.group)
        sampled = queries * architecture.head_dim**2  # of a key head
        moments += 4 * sampled * architecture.kv_heads
    gradients, solutions = _gradient_bytes(architecture, layer), 8 * kept
    alone = len(layer.assignments) * (0 if shared else architecture.layer_parameters * run)
    rest = architecture.layer_parameters - sum(a.whole for a in layer.assignments)
    reduced = 2 * kept * stored + (0 if shared else (rest + kept) * run) + alone
    attention = 20 * architecture.heads * seq_len**2 if _targets(layer) & {"qk"} else 0
    widths = _refit_widths(architecture, layer) if refits else []
    measured = int(held_out_blocks(samples).sum()) or samples
    states = streams + (stream if refits else 0) + stream * measured // samples
    base = states + weights
    stages = {
        "observe": base + 2 * moments + activations,
        "solve": base
        + moments
        + gradients
        + solutions
        + max(_solve_work(architecture, a, sampled) for a in layer.assignments),
        "measure": base + moments + gradients + reduced + activations + attention,
    }
    if refits:
        # Sums, and what is added to one of the two, while a batch runs; then those and the solve's.
        work = max(
            max(_refit_work(architecture, n), 12 * n * (n + architecture.hidden) + activations)
            for n in widths
        )
        read = widths[0] * samples * seq_len * run if _targets(layer) & _ATTENTION else 0
        stages["refit"] = base + read + reduced + work
    return stages


def _solve_work(architecture: Architecture, assignment: Assignment, sampled: int) -> int:
    """Float64 working set of one solve: the moment, its damped copy, what is multiplied and factored of it.

    ``sampled``: elements of the covariances that go with the sampled queries of one key head.
    """
    target, hidden, options = assignment.target, architecture.hidden, assignment.options
    if target == "mlp":
        output = architecture.matrices[architecture.family.mlp_output]
        n, kept = output.columns, assignment.size
        elimination = n**2 if options.get("select") == "obs" else 0
        return 8 * (
            _joint_work(n, kept, output.bias)
            + 2 * hidden * n
            + elimination
            + _metric_work(hidden, n, options)
        )
    if target == "ov":
        biased = architecture.matrices["v"].bias or architecture.matrices["o"].bias
        n, kept = architecture.heads * architecture.head_dim, architecture.heads * assignment.size
        alternating = 2 * hidden * (n + kept) + 3 * n * kept if options.get("subspace") == "joint" else 0
        work = _joint_work(n, kept, biased) + n**2 + 2 * n * kept + 3 * hidden * n
        return 8 * (work + alternating + _metric_work(hidden, n, options))
    if target == "qk":
        return 8 * (2 * hidden**2 + 3 * architecture.heads * architecture.head_dim * hidden + 3 * sampled)
    matrix = architecture.matrices[target]
    solvers = methods()[assignment.method].solvers
    # Blind to the data, a method still needs the moment to predict what it does; others damp and factor it.
    metric = solvers["projection"].metric
    outer = 3 * matrix.rows**2 if metric == "loss" else 0
    copies = 1 if metric == "weight" else 4
    small = min(matrix.rows, matrix.columns)
    return 8 * (copies * matrix.columns**2 + outer + 4 * matrix.parameters + 5 * small**2)


def _metric_work(hidden: int, n: int, options: Mapping[str, Any]) -> int:
    """Elements of G, its root and the weight that it multiplies."""
    return 4 * hidden**2 + hidden * n if options.get("metric") == "loss" else 0


def _joint_work(n: int, kept: int, biased: bool) -> int:
    """Elements of a least-squares fit from ``kept`` of n inputs: C and its damped copy, C Tᵀ, T C Tᵀ and its factor."""
    return (3 if biased else 2) * n**2 + max(n**2, n * kept + 4 * kept**2)


def _refit_work(architecture: Architecture, n: int) -> int:
    """Sums in float32 and ridge regressions in float64 of a projection that reads n inputs: the moments fitted to and
    held out, the former centred, damped and factored.
    """
    hidden = architecture.hidden
    return 8 * n * (n + hidden) + 8 * (5 * n**2 + 6 * hidden * n)


def _refit_widths(architecture: Architecture, layer: LayerPlan) -> list[int]:
    """Inputs of the linears that are refitted: of the attention's half first, then of the MLP's."""
    found = []
    sizes = {a.target: a.size for a in layer.assignments}
    output = architecture.family.mlp_output
    if _targets(layer) & _ATTENTION:
        full = architecture.heads * architecture.head_dim
        found.append(sizes.get("o", architecture.heads * sizes["ov"] if "ov" in sizes else full))
    if _targets(layer) - _ATTENTION:
        found.append(sizes.get("mlp", sizes.get(output, architecture.matrices[output].columns)))
    return found


def _token_bytes(architecture: Architecture, layer: LayerPlan, run: int) -> int:
    """Activations held for one token while a layer runs and is compared with its reductions."""
    hidden, width = architecture.hidden, architecture.matrices[architecture.family.mlp_output].columns
    projections = _targets(layer) - {"qk", "ov", "mlp"}
    return hidden * (6 * 4 + 6 * run) + width * (3 * run + 16 if projections else 7 * run)


def _targets(layer: LayerPlan) -> set[str]:
    return {assignment.target for assignment in layer.assignments}
