"""What a compression costs, from shapes: operations and bytes by stage, and the seconds that rates make of them.

    python scripts/scaling.py table               # seconds by stage of 7B to 1T on 1, 8 and 64 GPUs, and their limits
    python scripts/scaling.py memory              # GPU and host memory of the same
    python scripts/scaling.py measured            # beside the measured stages of a 7B model on one H200
    python scripts/scaling.py compare MODEL REPORT --plan PLAN      # beside a report.json made on this machine's CPU

Shapes and ranks are those of ``lrc check``, which reads checkpoints of headers alone: sparse files of the right length.
The count follows the loop; tests/scripts/test_scaling.py holds it to what a run really does. What passes over
activations and not over matrices is left out, but for what the measured rates have of it.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from random_checkpoint import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM

from lrc.compression.refit import DIRECTIONS, RIDGES, held_out_blocks
from lrc.estimate.memory import estimate_memory
from lrc.moments.moment import GRAM_BLOCK
from lrc.plan.job import Job, prepare
from lrc.run.settings import default_batch
from lrc.walk.backward import stride

MODELS = {"7B": "llama-7b", "70B": "llama-70b", "405B": "llama-405b"}
# One of 384 experts stands for all, of which eight are chosen, and for one that all tokens pass: as Kimi K2, but with
# grouped queries in place of its latent attention and with experts in its first layer too. lrc has no such family yet.
EXPERT = {
    "model_type": "llama",
    "hidden_size": 7168,
    "intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "vocab_size": 163840,
}
EXPERTS, CHOSEN = 384, 8
GPUS, NODE = (1, 8, 64), 8
KEEP = 0.8
WINDOWS = 166  # of 2048 in WikiText-2's test split, by Llama's tokenizer
LOGIT_STEPS = 6  # Newton's steps for the logits' scale; the data decide
GPU_BYTES, HOST_BYTES = 141e9, 2e12  # the second of a node, assumed
MEASURED = {  # seconds of LLaMA-7B's shape on one H200, by scripts/speed.py: the README's table
    "gradients": 11.2,
    "load": 0.5,
    "observe": 10.0,
    "solve": 17.1,
    "measure": 2.5,
    "refit": 25.0,
    "scale": 0.9,
    "write": 1.4,
}


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, in operations and bytes, and seconds of float64 factorizations by size."""

    products: float
    sums: float  # products that sum moments
    double: float
    qr: float
    memory: float
    link: float
    states: float  # hidden states over the link, beside the work
    disk: float
    cache: float  # of what was read before
    write: float
    network: float
    points: Mapping[str, Mapping[int, float]]

    def of(self, key: str | tuple[str, int]) -> float:
        """Seconds of one operation, byte or factorization; of these by the power law of two sizes, or above by n³."""
        if isinstance(key, str):
            return 1 / getattr(self, key)
        name, n = key
        (low, at), (high, there) = min(self.points[name].items()), max(self.points[name].items())
        if low == high or n > high:
            return there * (n / high) ** 3
        return at * (n / low) ** (math.log(there / at) / math.log(high / low))


def h200(gpus: int) -> Rates:
    """One H200 of ``gpus``: reference figures of a prototype, on LLaMA-7B's shape with 128 x 2048 tokens in bfloat16,
    unless a figure is said to be assumed.
    """
    tokens, layers, hidden, width = 128 * 2048, 32, 4096, 11008
    forward = layers * tokens * (2 * (4 * hidden**2 + 3 * hidden * width) + 4 * 2048 * hidden)
    return Rates(
        products=forward / 4.9,  # seconds of a bare forward pass
        sums=2 * layers * tokens * width**2 / 2.6,  # seconds of the widest moments
        double=50e12,  # assumed: three quarters of the data sheet's 67e12
        qr=10e12,  # assumed
        memory=4e12,  # assumed: five sixths of the data sheet's 4.8e12
        link=50e9,  # assumed: pinned copies over PCIe 5, which has 64e9
        states=50e9,
        disk=2.5e9,
        # From the page cache through the search for NaN to pinned memory, by a prototype of scripts/speed.py read: a
        # launcher of several processes leaves each one thread for sums on the host.
        cache=17e9 if gpus == 1 else 9e9,
        write=1.4e9,
        network=300e9
        if gpus <= NODE
        else 150e9,  # assumed: NVLink; eight adapters of 50e9 in a node of eight
        points={
            "cholesky": {11008: 0.02},
            "eigh": {4096: 0.1, 11008: 0.93},
        },
    )


UNITS = {
    "matrix unit": ("products", "sums"),
    "float64": ("double", "qr", "cholesky", "eigh"),
    "GPU memory": ("memory",),
    "host link": ("link", "states"),
    "disk": ("disk", "cache", "write"),
    "network": ("network",),
}
_LETTERS = dict(zip(UNITS, "mfgldn", strict=True))
_LEGEND = "; ".join(
    [
        *(f"{letter} {unit}" for unit, letter in _LETTERS.items()),
        "* a GPU has too little memory",
        "† a node has too little",
    ]
)
Work = Counter[str | tuple[str, int]]


@dataclass(frozen=True)
class Mlp:
    """MLPs of one width, ``copies`` in a layer, of which a token passes ``active``; ``kept`` of their neurons stay."""

    width: int
    kept: int
    copies: int = 1
    active: int = 1


@dataclass(frozen=True)
class Shape:
    """A model, and what ``a3`` leaves of its layers: ranks of q and k, of value heads, and neurons.

    ``seq``: tokens of a block. ``stored``: bytes of a weight. ``low``: layers run in half precision.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    mlps: tuple[Mlp, ...]
    q_rank: int
    k_rank: int
    ov_rank: int
    seq: int
    stored: int
    low: bool

    @property
    def width(self) -> int:
        """Of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads."""
        return self.kv_heads * self.head_dim

    @property
    def attention(self) -> int:
        """Weights of a layer's attention."""
        return 2 * self.hidden * (self.width + self.keys)

    @property
    def pairs(self) -> int:
        """Weights of q and k as pairs."""
        return self.q_rank * (self.hidden + self.width) + self.k_rank * (self.hidden + self.keys)

    @property
    def read(self) -> int:
        """What the reduced output projection reads."""
        return self.heads * self.ov_rank

    @property
    def values(self) -> int:
        """Weights of the reduced values."""
        return self.kv_heads * self.ov_rank * self.hidden

    @property
    def layer(self) -> int:
        """Weights of a layer."""
        return self.attention + sum(3 * self.hidden * mlp.width * mlp.copies for mlp in self.mlps)

    @property
    def kept(self) -> int:
        """Weights of a reduced layer."""
        mlps = sum(3 * self.hidden * mlp.kept * mlp.copies for mlp in self.mlps)
        return self.pairs + self.values + self.read * self.hidden + mlps

    @property
    def tables(self) -> int:
        """Weights of embedding and head."""
        return 2 * self.vocab * self.hidden

    @property
    def passed(self) -> int:
        """Weights of a layer that a token passes."""
        return self.attention + sum(3 * self.hidden * mlp.width * mlp.active for mlp in self.mlps)

    @property
    def neurons(self) -> int:
        """Weights of one matrix of reduced MLPs that a token passes."""
        return sum(self.hidden * mlp.kept * mlp.active for mlp in self.mlps)

    @property
    def scores(self) -> int:
        """Operations of a token against all of its block; a causal kernel does half of them."""
        return 4 * self.seq * self.width

    @property
    def forward(self) -> int:
        """Operations of a token in a layer."""
        return 2 * self.passed + self.scores

    @property
    def outputs(self) -> tuple[int, ...]:
        """Outputs of a layer that gradient moments are taken of: q's, k's, o's and the MLP's."""
        return self.width, self.keys, self.hidden, self.hidden

    @property
    def slopes(self) -> int:
        """Elements of a layer's gradient moments."""
        return sum(n**2 for n in self.outputs)


@dataclass(frozen=True)
class Run:
    """A calibration shared by ``gpus`` processes, ``batch`` blocks at once; hidden states wait on the host or not."""

    blocks: int = 128
    gradient_blocks: int = 32
    batch: int = 8
    gpus: int = 1
    windows: int = WINDOWS
    on_host: bool = False

    @property
    def held(self) -> int:
        """Blocks that reductions are measured on and ridges chosen."""
        return int(held_out_blocks(self.blocks).sum()) or self.blocks

    def share(self, blocks: int) -> int:
        """Of the process that has most."""
        return math.ceil(blocks / self.gpus)

    def batches(self, blocks: int) -> int:
        """Of that process."""
        return math.ceil(self.share(blocks) / self.batch)


@dataclass(frozen=True)
class Stage:
    """What every process does, and lists of what is spread over them, one list after the other.

    ``behind``: the disk is at it while the next layer is at work.
    """

    own: Work
    spread: Sequence[Sequence[Work]] = ()
    behind: bool = False


def count(shape: Shape, run: Run) -> dict[str, Stage]:
    """The stages of ``lrc compress`` that take time, all layers together."""
    stages = {
        "gradients": Stage(_gradients(shape, run)),
        "load": Stage(Work(dict.fromkeys(("cache", "link"), shape.stored * shape.layer))),
        "observe": Stage(_observe(shape, run)),
        "solve": Stage(Work({"network": _sent(8 * shape.kept, run)}), [_solves(shape)]),
        "measure": Stage(_measure(shape, run)),
        "refit": Stage(_refit(shape, run), _ridges(shape, run)),
        "scale": Stage(_scale(shape, run)),
        "write": Stage(Work(dict.fromkeys(("link", "write"), shape.stored * shape.kept)), behind=True),
        "evaluate": Stage(_evaluate(shape, run)),
    }
    once = ("gradients", "scale", "evaluate")
    return {name: stage if name in once else _all_layers(stage, shape) for name, stage in stages.items()}


def _all_layers(stage: Stage, shape: Shape) -> Stage:
    spread = [[_times(work, shape.layers) for work in group] for group in stage.spread]
    return replace(stage, own=_times(stage.own, shape.layers), spread=spread)


def _times(work: Work, times: int) -> Work:
    return Work({key: times * amount for key, amount in work.items()})


def _gradients(shape: Shape, run: Run) -> Work:
    """Forward, the layers between inputs that are kept forward again, and each again on the way back."""
    tokens, layers = run.share(run.gradient_blocks) * shape.seq, shape.layers
    state = 4 * shape.hidden
    again = layers - math.ceil(layers / stride(layers, run.gradient_blocks * shape.seq * state))
    forward, back = layers + again, layers
    size = shape.stored * shape.layer
    # Down to the inputs alone: once the weights, and five products of attention for two on the way there.
    backward = 2 * shape.passed + 5 * shape.scores // 2
    head = 4 * shape.vocab * shape.hidden
    return Work(
        {
            "products": tokens * ((forward + back) * shape.forward + back * backward + head),
            "sums": 2 * tokens * layers * sum(map(_upper, shape.outputs)),
            # What a batch adds is made, scaled and added; softmax, labels and scale pass over the logits.
            "memory": 24 * layers * sum(map(_upper, shape.outputs)) * run.batches(run.gradient_blocks)
            + 40 * tokens * shape.vocab,
            "link": (forward + back) * size,
            "states": run.on_host
            * (tokens * state * (2 * forward + 3 * back + 2) + 4 * layers * shape.slopes),
            "disk": layers * size,
            "cache": (forward + back - layers) * size,
            "network": _reduced(4 * layers * shape.slopes, run),
        }
    )


def _observe(shape: Shape, run: Run) -> Work:
    tokens, state = run.share(run.blocks) * shape.seq, 4 * shape.hidden
    seen = _upper(shape.hidden) + _upper(shape.width)  # of what q and k read, and the output projection
    held = shape.hidden**2 + shape.width**2 + sum(mlp.copies * mlp.width**2 for mlp in shape.mlps)
    added = seen + sum(mlp.copies * _upper(mlp.width) for mlp in shape.mlps)
    return Work(
        {
            "products": tokens * shape.forward,
            "sums": 2 * tokens * (seen + sum(mlp.active * _upper(mlp.width) for mlp in shape.mlps)),
            "memory": 12 * added * run.batches(run.blocks),
            "states": run.on_host * (3 * tokens * state + 4 * shape.slopes),
            "network": _reduced(4 * held, run),
        }
    )


def _upper(n: int) -> int:
    """Elements of a symmetric sum that are summed: the blocks of ``lrc.moments.moment.add_gram``."""
    return sum(min(GRAM_BLOCK, n - start) * (n - start) for start in range(0, n, GRAM_BLOCK))


def _solves(shape: Shape) -> list[Work]:
    """Each target of a layer, in float64."""
    mlps = [_solve_mlp(shape, mlp) for mlp in shape.mlps for _ in range(mlp.copies)]
    pairs = [
        _solve_pair(rows, shape.hidden, rank)
        for rows, rank in ((shape.width, shape.q_rank), (shape.keys, shape.k_rank))
    ]
    return [*pairs, _solve_values(shape), *mlps]


def _solve_pair(rows: int, columns: int, rank: int) -> Work:
    """``lrc.maths.linalg.best_pair`` for both moments, and what it says of its error."""
    near, far = min(rows, columns), max(rows, columns)
    inner = 2 * near * far**2 + 2 * near**2 * far + 4 * near**3 + 3 * near**2 * rank + 2 * rank * near * far
    balanced = 2 * rank**2 * (rows + 3 * columns)
    errors = 2 * rows * rank * columns + 4 * rows * columns**2 + 2 * rows**2 * columns
    return Work(
        {
            "double": inner + balanced + errors,
            "qr": 4 * rows * rank**2 - 4 * rank**3 // 3,
        }
    ) + Work([("cholesky", far), ("cholesky", near), ("eigh", near), ("eigh", rank)])


def _solve_values(shape: Shape) -> Work:
    """The stacked subspaces of all heads and the joint fit. Rounds for shared value heads are small and not counted."""
    hidden, width, read, dim = shape.hidden, shape.width, shape.read, shape.head_dim
    metric = 2 * hidden**2 * width + 2 * width * dim * hidden
    heads = shape.kv_heads * (4 * dim**3 + 3 * dim**2 * shape.ov_rank)
    fit = 2 * read * width**2 + 2 * read**2 * width + 2 * hidden * width * read + 2 * hidden * read**2
    rest = 2 * shape.values * dim + 2 * hidden * read * width + 4 * hidden * width**2 + 2 * hidden**2 * width
    own = Work({("cholesky", dim): shape.kv_heads, ("eigh", dim): shape.kv_heads})
    return (
        Work({"double": metric + heads + fit + rest}) + own + Work([("cholesky", hidden), ("cholesky", read)])
    )


def _solve_mlp(shape: Shape, mlp: Mlp) -> Work:
    hidden, width, kept = shape.hidden, mlp.width, mlp.kept
    fit = 2 * hidden**2 * width + 2 * hidden * width * kept + 2 * hidden * kept**2
    errors = 4 * hidden * width**2 + 2 * hidden**2 * width
    return Work({"double": fit + errors}) + Work([("cholesky", hidden), ("cholesky", kept)])


def _measure(shape: Shape, run: Run) -> Work:
    """The original layer, and beside it q, k, the attention with its values reduced, and the MLP, each alone."""
    tokens = run.share(run.held) * shape.seq
    pairs = shape.hidden * (shape.width + shape.keys) + shape.pairs
    values = shape.hidden * (shape.width + shape.keys) + shape.values + shape.read * shape.hidden
    alone = 2 * (pairs + values + 3 * shape.neurons) + shape.scores
    state = 4 * shape.hidden
    return Work({"products": tokens * (shape.forward + alone), "states": run.on_host * tokens * state})


def _refit(shape: Shape, run: Run) -> Work:
    """Attention once for both fits; the output projection three times and what precedes the MLP's twice."""
    tokens, fitted = run.share(run.blocks) * shape.seq, _fits(shape)
    products = 2 * (shape.pairs + shape.values) + shape.scores
    products += 2 * 3 * shape.read * shape.hidden + 2 * (2 * 2 + 2) * shape.neurons
    sums = sum(_summed(shape, fit) for fit in fitted)
    held = sum(copies * (n**2 + n * shape.hidden) for n, copies, _ in fitted)
    added = sum(copies * (_upper(n) + n * shape.hidden) for n, copies, _ in fitted)
    moved = run.on_host * tokens * (4 * 6 * shape.hidden + 2 * 3 * shape.read)
    return Work(
        {
            "products": tokens * products,
            "sums": tokens * sums,
            "memory": (18 if shape.low else 12) * added * run.batches(run.blocks),
            "states": moved,
            # Sums of blocks fitted to and held out; what one process fitted goes to all, in float64.
            "network": _reduced(8 * held, run)
            + _sent(8 * sum(copies * n * shape.hidden for n, copies, _ in fitted), run),
        }
    )


def _fits(shape: Shape) -> list[tuple[int, int, int]]:
    """Inputs of the projections that are refitted, how many there are in a layer and how many a token passes."""
    return [(shape.read, 1, 1), *((mlp.kept, mlp.copies, mlp.active) for mlp in shape.mlps)]


def _summed(shape: Shape, fit: tuple[int, int, int]) -> int:
    """Operations of a token in the sums of a fit; what is missing, in float32, is split into two of low precision."""
    n, _, active = fit
    return active * (2 * _upper(n) + 2 * (2 if shape.low else 1) * n * shape.hidden)


def _ridges(shape: Shape, run: Run) -> list[list[Work]]:
    """The fit for every ridge without the held-out blocks, in some directions of the output, with the best in all of
    them, and with that on all blocks; one process each.
    """
    (read, _, _), *mlps = _fits(shape)
    tries, fits, some = (len(RIDGES), 2, min(DIRECTIONS, shape.hidden)) if run.blocks > 1 else (0, 1, 0)
    fitted = tries * some + fits * shape.hidden  # outputs, over all fits

    def fit(n: int) -> Work:
        sides = (
            4 * some * shape.hidden * n if some < shape.hidden and tries else 0
        )  # sums in those directions
        copies = (tries + fits) * 32 * n**2 + 48 * n * fitted  # in float64: damped, changed, multiplied
        return Work({"double": 4 * fitted * n**2 + sides, "memory": copies, ("cholesky", n): tries + fits})

    return [[fit(read)], [fit(n) for n, copies, _ in mlps for _ in range(copies)]]


def _scale(shape: Shape, run: Run) -> Work:
    tokens = run.share(run.held) * shape.seq
    logits = tokens * shape.vocab
    return Work(
        {
            "products": 2 * logits * shape.hidden * (2 + LOGIT_STEPS),
            "memory": 4 * logits * (12 + 10 * LOGIT_STEPS),
        }
    )


def _evaluate(shape: Shape, run: Run) -> Work:
    """Both models on all windows, each read once."""
    tokens = run.share(run.windows) * shape.seq
    reduced = 2 * (shape.kept - _idle(shape)) + shape.scores
    head = 2 * shape.vocab * shape.hidden
    size = shape.stored * (shape.layers * (shape.layer + shape.kept) + 2 * shape.tables)
    return Work(
        {
            "products": tokens * (shape.layers * (shape.forward + reduced) + 2 * head),
            "memory": 2 * 12 * tokens * shape.vocab,
            "link": size,
            "cache": size,
        }
    )


def _idle(shape: Shape) -> int:
    """Weights of reduced experts that a token does not pass."""
    return sum(3 * shape.hidden * mlp.kept * (mlp.copies - mlp.active) for mlp in shape.mlps)


def _reduced(size: int, run: Run) -> int:
    """Bytes that a ring carries through each process to add up ``size``."""
    return 2 * size * (run.gpus - 1) // run.gpus


def _sent(size: int, run: Run) -> int:
    """Bytes that reach each process of what one has."""
    return size if run.gpus > 1 else 0


@dataclass(frozen=True)
class Cost:
    """Seconds of a stage, and those that each unit is at work: ``reading`` of the disk's and ``states`` of the host
    link's go beside all others'.
    """

    seconds: float
    units: dict[str, float]
    reading: float
    states: float = 0.0

    @property
    def limit(self) -> str:
        """The unit that is waited for longest."""
        if self.reading == self.seconds:
            return "disk"
        if self.states == self.seconds:
            return "host link"
        waited = self.units | {
            "disk": self.units["disk"] - self.reading,
            "host link": self.units["host link"] - self.states,
        }
        return max(waited, key=lambda unit: waited[unit])


def costs(stages: Mapping[str, Stage], shape: Shape, run: Run, rates: Rates) -> dict[str, Cost]:
    """Seconds by stage. Layers are read, and written where that is ``behind``, while others are at work; all else waits
    for what is before it.
    """
    found = {name: _cost(stage, run, rates) for name, stage in stages.items()}
    # Of the loop's reading and writing, what takes longer than the layers' work is waited for, and one layer of each.
    behind = ["load", *(name for name, stage in stages.items() if stage.behind)]
    left = sum(found[n].seconds for n in ("observe", "solve", "measure", "refit", "write") if n not in behind)
    for name in behind:
        units = found[name].units
        disk = max(units["disk"] - left, units["disk"] / shape.layers)
        left = max(left - units["disk"], 0.0)
        others = sum(seconds for unit, seconds in units.items() if unit != "disk")
        found[name] = Cost(disk + others, units | {"disk": disk}, 0.0)
    return found


def _cost(stage: Stage, run: Run, rates: Rates) -> Cost:
    work = Work(stage.own)
    for group in stage.spread:
        work.update(_longest(group, run.gpus, rates))
    units = by_unit(work, rates)
    reading = sum(work[key] * rates.of(key) for key in ("disk", "cache"))
    states = work["states"] * rates.of("states")
    return Cost(max(reading, states, sum(units.values()) - reading - states), units, reading, states)


def _longest(group: Sequence[Work], gpus: int, rates: Rates) -> Work:
    """What is waited for where each of a list is done by one process in turn."""
    total = Work()
    for start in range(0, len(group), gpus):
        total.update(max(group[start : start + gpus], key=lambda work: sum(by_unit(work, rates).values())))
    return total


def by_unit(work: Work, rates: Rates) -> dict[str, float]:
    """Seconds that each unit is at work."""
    return {
        unit: sum(
            amount * rates.of(key)
            for key, amount in work.items()
            if (key if isinstance(key, str) else key[0]) in keys
        )
        for unit, keys in UNITS.items()
    }


def shape_of(job: Job, *, low: bool) -> Shape:
    """The shape of a checkpoint and of its layers by a plan that makes all of them alike."""
    architecture, plans = job.reader.architecture, job.plan.layers
    assert all(plan.assignments == plans[0].assignments for plan in plans), "layers differ"
    sizes = {assignment.target: assignment.size for assignment in plans[0].assignments}
    return Shape(
        layers=architecture.layers,
        hidden=architecture.hidden,
        heads=architecture.heads,
        kv_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        vocab=architecture.vocab,
        mlps=(Mlp(architecture.matrices["down"].columns, sizes["mlp"]),),
        q_rank=sizes["q"],
        k_rank=sizes["k"],
        ov_rank=sizes["ov"],
        seq=job.plan.seq_len,
        stored=job.reader.dtype.itemsize,
        low=low,
    )


def with_experts(shape: Shape) -> Shape:
    """The mixture of experts that one expert stands for."""
    (one,) = shape.mlps
    return replace(shape, mlps=(replace(one, copies=EXPERTS, active=CHOSEN), one))


def headers_only(folder: Path, config: Any) -> None:
    """A checkpoint that takes no disk: its headers, before a hole as long as its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(folder)
    header, end = {}, 0
    for name, tensor in model.named_parameters():
        start, end = end, end + tensor.numel() * config.dtype.itemsize
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)


@contextmanager
def prepared(config: Any, run: Run) -> Iterator[Job]:
    """A job for one of the run's processes: a headers-only checkpoint, with that process's part of the calibration."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, plan = Path(scratch), Path(scratch) / "plan.yaml"
        headers_only(folder, config)
        samples = {"samples": run.share(run.blocks), "gradient_samples": run.share(run.gradient_blocks)}
        plan.write_text(f"format: 1\nkeep: {KEEP}\ncalibration: {json.dumps(samples)}\n", encoding="utf-8")
        yield prepare(folder, plan)


@dataclass(frozen=True)
class Held:
    """Bytes on the GPU at the peak, where hidden states wait on it and where on the host, and the stages of the peaks;
    what hidden states and gradients take where they wait on the host.
    """

    device: int
    away: int
    stage: str
    stage_away: str
    states: int
    gradients: int

    @property
    def on_host(self) -> bool:
        """Whether hidden states have to wait on the host, by the rule of ``lrc.estimate.memory.choose_place``."""
        return self.device > 0.8 * GPU_BYTES


def held(job: Job, shape: Shape) -> Held:
    """What ``lrc check`` estimates; of experts it knows one, and what the others bring is added."""
    batch = default_batch("cuda", job.plan.seq_len)
    found = [estimate_memory(job, torch.bfloat16, batch, place) for place in ("device", "host")]
    peaks = []
    for memory in found:
        stages = {name: bytes_ + _of_experts(shape, name) for name, bytes_ in memory.stages.items()}
        peaks.append(max((bytes_, name) for name, bytes_ in stages.items()))
    (device, stage), (away, stage_away) = peaks
    return Held(device, away, stage, stage_away, found[0].states, found[0].gradients)


def _of_experts(shape: Shape, stage: str) -> int:
    """Bytes that all MLPs of a layer but one take, counted as ``lrc.estimate.memory`` counts the one."""
    one, hidden, found = shape.mlps[-1], shape.hidden, 0
    more = sum(mlp.copies for mlp in shape.mlps) - 1
    weights, kept = 3 * hidden * one.width * shape.stored, 3 * hidden * one.kept
    if stage in ("gradients", "observe", "solve", "measure", "refit"):
        found += weights
    if stage in ("observe", "solve", "measure"):
        found += 4 * one.width**2 * (2 if stage == "observe" else 1)
    if stage == "solve":
        found += 8 * kept
    if stage in ("measure", "refit"):
        found += 2 * kept * shape.stored
    if stage == "refit":
        found += 8 * one.kept * (one.kept + hidden)
    return more * found


@dataclass(frozen=True)
class Case:
    """A model on some GPUs."""

    name: str
    shape: Shape
    run: Run
    memory: Held

    @property
    def label(self) -> str:
        """GPUs, with marks where the memory of each, or of a node, is too small."""
        full = self.memory.away > GPU_BYTES, self._on_node > HOST_BYTES
        return f"{self.run.gpus}{'*' * full[0]}{'†' * full[1]}"

    @property
    def rates(self) -> Rates:
        """Those of an H200; a checkpoint that the host's memory cannot keep is read from disk each time."""
        rates = h200(self.run.gpus)
        size = self.shape.stored * (self.shape.layers * self.shape.layer + self.shape.tables)
        return rates if size + self._on_node <= HOST_BYTES else replace(rates, cache=rates.disk)

    @property
    def _on_node(self) -> int:
        """Bytes that the processes of a node hold on the host."""
        states = self.memory.states + self.memory.gradients if self.run.on_host else 0
        return min(self.run.gpus, NODE) * states

    @property
    def costs(self) -> dict[str, Cost]:
        """Seconds by stage."""
        return costs(count(self.shape, self.run), self.shape, self.run, self.rates)


def cases() -> Iterator[Case]:
    """Every model on every number of GPUs."""
    named = {name: SHAPES[shape] for name, shape in MODELS.items()} | {"1T MoE": EXPERT}
    for name, values in named.items():
        config = AutoConfig.for_model(**values)
        config.dtype = torch.bfloat16
        for gpus in GPUS:
            run = Run(gpus=gpus)
            with prepared(config, run) as job:
                shape = shape_of(job, low=True)
                shape = with_experts(shape) if values is EXPERT else shape
                memory = held(job, shape)
            yield Case(name, shape, replace(run, on_host=memory.on_host), memory)


def cpu(shape: Shape, run: Run) -> Rates:
    """What this machine's CPU does now, measured for a moment on matrices of the shapes that the run has."""
    (mlp,), rows = shape.mlps, run.batch * shape.seq
    x, weight = torch.randn(rows, shape.hidden), torch.randn(shape.hidden, mlp.width)
    wide = torch.randn(rows, mlp.width)
    square = (wide.T @ wide).double()
    thin = torch.randn(shape.hidden, shape.q_rank, dtype=torch.float64)
    block = torch.randn(2**24)
    copied = block.nbytes / _seconds(block.clone)
    sides = {
        "cholesky": {mlp.kept, shape.hidden, shape.head_dim},
        "eigh": {shape.hidden, shape.head_dim, shape.q_rank},
    }
    factor = {
        "cholesky": torch.linalg.cholesky_ex,
        "eigh": torch.linalg.eigh,
    }

    def matrix(n: int) -> torch.Tensor:
        return square[:n, :n] + torch.eye(n) * square.diagonal().mean()

    points = {
        name: {n: _seconds(lambda name=name, n=n: factor[name](matrix(n))) for n in (min(ns), max(ns))}
        for name, ns in sides.items()
    }
    return Rates(
        products=2 * rows * shape.hidden * mlp.width / _seconds(lambda: x @ weight),
        sums=2 * rows * mlp.width**2 / _seconds(lambda: wide.T @ wide),
        double=2 * shape.hidden * mlp.width**2 / _seconds(lambda: square[: shape.hidden] @ square),
        qr=(4 * shape.hidden * shape.q_rank**2 - 4 * shape.q_rank**3 / 3)
        / _seconds(lambda: torch.linalg.qr(thin)),
        memory=2 * copied,  # read and written
        link=math.inf,  # the host is the device
        states=math.inf,
        disk=copied,  # from the page cache
        cache=copied,
        write=block.nbytes / _seconds(lambda: _write(block)),
        network=math.inf,
        points=points,
    )


def _write(block: torch.Tensor) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(block.numpy().tobytes())


def _seconds(call: Callable[[], object]) -> float:
    """The least of a few calls: what else the machine does only adds."""
    call()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


app = typer.Typer(add_completion=False)


@app.command()
def table() -> None:
    """Seconds by stage of every model on every number of GPUs, and what limits each stage."""
    every = list(cases())
    stages = list(every[0].costs)
    print(f"| model | GPUs | {' | '.join(stages)} | all but evaluate |")
    print("|---|" + "---|" * (len(stages) + 2))
    for case in every:
        found = case.costs
        whole = sum(cost.seconds for name, cost in found.items() if name != "evaluate")
        cells = [f"{_number(found[name].seconds)} {_LETTERS[found[name].limit]}" for name in stages]
        print(f"| {case.name} | {case.label} | {' | '.join(cells)} | {_number(whole)} |")
    print(f"\n{_LEGEND}\n\nSeconds that each unit is at work, without evaluate:\n")
    print(f"| model | GPUs | {' | '.join(UNITS)} |\n|---|---|{'---|' * len(UNITS)}")
    for case in every:
        found = [cost.units for name, cost in case.costs.items() if name != "evaluate"]
        cells = [_number(sum(units[unit] for units in found)) for unit in UNITS]
        print(f"| {case.name} | {case.label} | {' | '.join(cells)} |")


@app.command()
def memory() -> None:
    """Bytes of each process on its GPU, and of what waits on the host where the GPU has no room."""
    print("| model | GPUs | GPU, states on it | GPU, states on the host | hidden states | gradients |")
    print("|---|---|---|---|---|---|")
    for case in cases():
        found = case.memory
        cells = [
            f"{found.device / 2**30:.1f} GiB ({found.stage})",
            f"{found.away / 2**30:.1f} GiB ({found.stage_away})",
            f"{found.states / 2**30:.1f} GiB",
            f"{found.gradients / 2**30:.1f} GiB",
        ]
        print(f"| {case.name} | {case.label} | {' | '.join(cells)} |")


@app.command()
def measured() -> None:
    """The measured stages of a 7B model on one H200 beside their count, and what limits them; as it was measured, the
    checkpoint is in the page cache.
    """
    case = next(cases())
    rates = replace(case.rates, disk=case.rates.cache)
    counted = costs(count(case.shape, case.run), case.shape, case.run, rates)
    print("| stage | measured | counted | measured / counted | limit |\n|---|---|---|---|---|")
    for name, took in MEASURED.items():
        cost = counted[name]
        print(f"| {name} | {took} | {_number(cost.seconds)} | {took / cost.seconds:.1f} | {cost.limit} |")
    total = sum(counted[name].seconds for name in MEASURED)
    every = sum(MEASURED.values())
    print(f"| all | {every:.1f} | {_number(total)} | {every / total:.1f} | |")


@app.command()
def compare(
    model: Annotated[Path, typer.Argument(help="The checkpoint that was compressed.")],
    report: Annotated[Path, typer.Argument(help="report.json of a compression on this machine's CPU.")],
    plan: Annotated[Path, typer.Option(help="The plan that it was compressed by.")],
    windows: Annotated[int, typer.Option(help="Windows that were evaluated.")] = 0,
) -> None:
    """Seconds by stage that were measured here beside the count, at rates measured now, and beside its share."""
    job, seconds = prepare(model, plan), json.loads(report.read_text(encoding="utf-8"))["seconds"]
    calibration, shape = job.plan.plan.calibration, shape_of(job, low=False)
    assert calibration.samples != "all", "the plan says how many blocks"
    batch = default_batch("cpu", shape.seq)
    run = Run(
        calibration.samples, min(calibration.gradient_samples, calibration.samples), batch, windows=windows
    )
    counted = {
        name: cost
        for name, cost in costs(count(shape, run), shape, run, cpu(shape, run)).items()
        if name in seconds
    }
    every = sum(seconds[name] for name in counted) / sum(cost.seconds for cost in counted.values())
    print(
        "| stage | counted | measured | measured / counted | of that of all | limit |\n|---|---|---|---|---|---|"
    )
    for name, cost in counted.items():
        ratio = seconds[name] / cost.seconds
        print(
            f"| {name} | {cost.seconds:.2f} | {seconds[name]:.2f} | {ratio:.2f} | {ratio / every:.2f} | {cost.limit} |"
        )
    print(f"\nAll: measured / counted {every:.2f}")


def _number(value: float) -> str:
    """Two digits."""
    return f"{float(f'{value:.2g}'):g}"


if __name__ == "__main__":
    app()
