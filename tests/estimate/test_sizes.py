"""``lrc check`` against what is really written, and the memory formula against what the loop really holds."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lrc.checkpoint.staging import staging
from lrc.compression.loop import Compressor
from lrc.estimate.memory import estimate_memory
from lrc.estimate.sizes import target_sizes
from lrc.families import families
from lrc.plan.job import Job, make_job, open_checkpoint
from lrc.plan.library import read_draft
from lrc.run.offload import States
from lrc.run.settings import Run
from lrc.run.stopwatch import Stopwatch
from lrc.verbs.check import check
from lrc.verbs.compress import compress
from lrc.verbs.verify import verify
from lrc.walk.backward import GradientSweep
from lrc.walk.needs import gradients_needed
from lrc.walk.stream import ModelStream

pytestmark = pytest.mark.usefixtures("without_pages")

TinyCheckpoint = Callable[..., Path]

PLANS = {
    "a3": "keep: 0.5\nmethod: a3",
    "a3 without refit": "keep: 0.5\nmethod: a3\nrefit: none",
    "svd": "keep: 0.5\nmethod: svd",
    "monarch": "keep: 0.5\nmethod: monarch\nrefit: none",
    "qk alone": "components: {qk: {rank: 4}}",
    "ov alone": "components: {ov: {rank: 4}}",
    "mlp alone": "components: {mlp: {rank: 7}}",
    "q alone": "method: svd\nprojections: {q: {rank: 5}}",
    "o alone": "method: svd\nprojections: {o: {rank: 5}}",
    "embed": "projections: {embed: {method: whitened_svd, rank: 9}}",
    "embed among others": "keep: 0.5\nprojections: {embed: {method: svd, keep: 0.5}}",
    "layers apart": "keep: 0.5\nlayers:\n  - {match: '0', mlp: keep-all}\n  - {match: '1', method: svd, keep: 0.4}",
}


def prepare(model: str | Path, plan: str | Path) -> Job:
    """A model and a plan resolved for it."""
    return make_job(*open_checkpoint(model, Run()), read_draft(plan))


@pytest.fixture
def write_plan(tmp_path: Path) -> Callable[..., Path]:
    def write(body: str, **calibration: int) -> Path:
        settings = json.dumps({"samples": 4} | calibration)
        path = tmp_path / "plan.yaml"
        path.write_text(f"format: 1\n{body}\ncalibration: {settings}\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A sentence of a certain length, again and again. " * 20, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("family", "body"),
    [
        *product(["gpt2", "llama"], PLANS.values()),
        *((family, "keep: 0.6") for family in sorted(families())),
        ("phi3", "keep: 0.6\nmethod: svd\nrefit: none"),
        ("gpt_neox", "projections: {k: {method: svd, keep: 0.5}}"),
    ],
)
def test_sizes_are_those_of_the_written_checkpoint(
    tiny_checkpoint: TinyCheckpoint,
    write_plan: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    family: str,
    body: str,
) -> None:
    if "layers:" in body and family == "gpt2":
        body = body.replace("keep: 0.4", "keep: 0.6")
    model, plan = tiny_checkpoint(family), write_plan(body)
    expected = check(model, plan)
    report = compress(model, plan, out=tmp_path / "out", calib=str(text), ppl=[], run=Run(device="cpu"))
    assert expected.before == report.before
    assert expected.after == report.after
    assert expected.keep == report.keep
    stored = load_file(tmp_path / "out" / "model.safetensors").values()
    assert expected.after.bytes == sum(tensor.nbytes for tensor in stored)
    assert expected.after.parameters == sum(t.numel() for t in stored if t.is_floating_point())


HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("family", "body", "dtypes"),
    [
        ("llama", "components: {qk: {rank: 4}}\nrefit: none", {".v_proj": HALF, ".up_proj": HALF}),
        ("llama", "keep: 0.5", {".layers.": HALF}),  # most bytes are those of the embedding and the head
        ("llama", "keep: 0.5\nmethod: a3\ncomponents: {qk: {method: a3}}", {"q_proj": HALF, "k_proj": BRAIN}),
        ("llama", "keep: 0.5\nmethod: monarch\nrefit: none", {"layers.1.": BRAIN, "up_proj": HALF}),
        ("llama", "projections: {embed: {method: svd, rank: 9}}", {"embed_tokens": BRAIN}),
        ("llama", "projections: {lm_head: {method: svd, rank: 9}}", {"lm_head": HALF}),
        ("gpt2", "keep: 0.5\nmethod: a3", {".h.0.": BRAIN, "weight": HALF}),  # biases and layer 0 apart
    ],
)
def test_factors_have_the_precision_of_what_they_replace(
    tiny_checkpoint: TinyCheckpoint,
    write_plan: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    family: str,
    body: str,
    dtypes: dict[str, torch.dtype],
) -> None:
    model, plan = tiny_checkpoint(family, vocab_size=1024), write_plan(body)

    def dtype(name: str) -> torch.dtype:
        return next((each for part, each in dtypes.items() if part in name), torch.float32)

    def module(name: str) -> str:
        """A tensor's name without those that factors and split projections add to it."""
        name = name.replace(".A.weight", ".weight").replace(".B.", ".").replace(".L", ".weight")
        name = name.replace(".R", ".weight")
        return re.sub(r"attn\.[qkv]_proj", "attn.c_attn", name) if family == "gpt2" else name

    tensors = load_file(model / "model.safetensors")
    mixed = {name: tensor.to(dtype(name)) for name, tensor in tensors.items()}
    save_file(mixed, model / "model.safetensors", metadata={"format": "pt"})
    report = compress(model, plan, out=tmp_path / "out", calib=str(text), ppl=[], run=Run(device="cpu"))
    assert check(model, plan).after == report.after
    stored = load_file(tmp_path / "out" / "model.safetensors")
    found = {name: t.dtype for name, t in stored.items() if t.is_floating_point()}
    assert found == {name: dtype(module(name)) for name in found}
    assert report.after.bytes == sum(tensor.nbytes for tensor in stored.values())
    assert verify(tmp_path / "out").sound


def test_layers_of_equal_settings_share_a_row(
    tiny_checkpoint: TinyCheckpoint, write_plan: Callable[..., Path]
) -> None:
    body = "keep: 0.5\ncomponents: {qk: {metric: loss}}\nlayers:\n  - {match: '2', mlp: keep-all}"
    rows = target_sizes(prepare(tiny_checkpoint("llama", num_hidden_layers=4), write_plan(body)))
    assert [(row.target, row.layers, row.size) for row in rows] == [
        ("qk", "0-3", 4),
        ("ov", "0-3", 4),
        ("mlp", "0-1, 3", 24),
    ]


PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class HeldBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive that any operation has touched; ``peak`` is the most of them.

    Products of bfloat16 matrices are computed in float32 and rounded, without counting the float32 copies. They have
    the same shapes and types, and a processor without instructions for bfloat16 needs 20 times as long for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and args[-1].dtype == torch.bfloat16:
            out = func(*(each.float() for each in args), **(kwargs or {})).bfloat16()
        else:
            out = func(*args, **(kwargs or {}))
        for value in tree_iter((args, kwargs, out)):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                storage = value.untyped_storage()
                if storage.filename is None:  # else it is on disk
                    self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def beside(job: Job) -> int:
    """Bytes of the layer that is read ahead and of the one that is being written: on the host, as all is here."""
    return 2 * job.reader.architecture.layer_parameters * job.reader.dtype.itemsize


WIDE: dict[str, dict[str, int]] = {
    "gpt2": {"n_embd": 128, "n_positions": 128},
    "llama": {"hidden_size": 128, "intermediate_size": 344, "max_position_embeddings": 128},
}


@pytest.mark.parametrize(
    ("samples", "batch_size", "dtype"),
    [(4, 1, torch.float32), (32, 16, torch.bfloat16)],
    ids=["few tokens", "many tokens, bfloat16"],
)
@pytest.mark.parametrize(
    ("family", "body"),
    [
        ("gpt2", "keep: 0.8"),
        ("llama", "keep: 0.8"),
        ("gpt2", "keep: 0.8\ncomponents: {qk: {metric: attention_als}}"),
        ("llama", "keep: 0.8\ncomponents: {ov: {subspace: joint}, mlp: {select: obs}}"),
        ("llama", "keep: 0.5\nmethod: svd\nrefit: none"),
        ("llama", "keep: 0.5\nmethod: whitened_svd"),
        ("llama", "keep: 0.5\nmethod: two_sided_svd"),
        ("llama", "keep: 0.5\nmethod: monarch\nrefit: none"),
        ("gpt2", "keep: 0.8\nprojections: {embed: {method: whitened_svd, keep: 0.5}}"),
    ],
    ids=[
        "a3 gpt2",
        "a3",
        "attention_als gpt2",
        "joint, obs",
        "svd",
        "whitened_svd",
        "two_sided_svd",
        "monarch",
        "embed gpt2",
    ],
)
def test_memory_is_at_most_what_is_estimated(
    tiny_checkpoint: TinyCheckpoint,
    write_plan: Callable[..., Path],
    tmp_path: Path,
    family: str,
    body: str,
    samples: int,
    batch_size: int,
    dtype: torch.dtype,
) -> None:
    wide = WIDE[family] | ({"vocab_size": 2048} if "embed" in body else {})
    job = prepare(tiny_checkpoint(family, **wide), write_plan(body, samples=samples, seq_len=128))
    blocks, device = torch.randint(0, 256, (samples, 128)), torch.device("cpu")
    with (
        staging(tmp_path / "out", {}, source=tmp_path / "m", fresh=False, force=False) as stage,
        HeldBytes() as held,
    ):
        stream = ModelStream(job.reader, device, dtype)
        Compressor(stream, job.plan, stage, Stopwatch(device)).run(
            blocks, batch_size, lambda *_: lambda _: None
        )
    estimate = estimate_memory(job, dtype, batch_size)
    expected = estimate.peak
    assert held.peak <= expected + beside(job)
    assert expected <= 2 * held.peak


@pytest.mark.parametrize("body", ["keep: 0.8", "keep: 0.5\nmethod: svd\nrefit: none"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_states_on_disk_take_what_is_estimated_and_no_memory(
    tiny_checkpoint: TinyCheckpoint, write_plan: Callable[..., Path], tmp_path: Path, family: str, body: str
) -> None:
    plan = write_plan(body, samples=24, seq_len=128, gradient_samples=1)
    job = prepare(tiny_checkpoint(family, **WIDE[family]), plan)
    blocks, device = torch.randint(0, 256, (24, 128)), torch.device("cpu")
    peaks = {}
    for place in ("device", "disk"):
        with (
            staging(tmp_path / place, {}, source=tmp_path / "m", fresh=False, force=False) as stage,
            HeldBytes() as held,
        ):
            stream = ModelStream(job.reader, device, torch.float32, States(place, stage.scratch))
            Compressor(stream, job.plan, stage, Stopwatch(device)).run(blocks, 2, lambda *_: lambda _: None)
        memory = estimate_memory(job, torch.float32, 2, place)
        expected = memory.peak
        assert held.peak <= expected + beside(job)
        assert expected <= 2 * held.peak
        peaks[place] = held.peak
    assert peaks["device"] - peaks["disk"] > memory.states / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients_take_at_most_what_is_estimated_of_host_and_device(
    tiny_checkpoint: TinyCheckpoint,
    write_plan: Callable[..., Path],
    family: str,
    batch_size: int,
    dtype: torch.dtype,
) -> None:
    plan = write_plan("keep: 0.5\nmethod: two_sided_svd", samples=16, seq_len=128, gradient_samples=8)
    job = prepare(tiny_checkpoint(family, num_hidden_layers=6, **WIDE[family]), plan)
    wanted = {layer.index: gradients_needed(job.reader.architecture, layer) for layer in job.plan.layers}
    blocks = torch.randint(0, 256, (8, 128))
    with HeldBytes() as held:
        stream = ModelStream(job.reader, torch.device("cpu"), dtype)
        found = GradientSweep(stream, blocks, batch_size).run(wanted, 0)
    memory = estimate_memory(job, dtype, batch_size)
    states = 7 * blocks.numel() * 128 * 4  # of six layers, and one gradient
    moments = sum(g.nbytes for moment in found.values() for g in moment.outputs.values())
    assert memory.gradients == states + moments
    assert held.peak <= memory.peak


def test_more_gradient_samples_than_blocks_are_no_more_states(
    tiny_checkpoint: TinyCheckpoint, write_plan: Callable[..., Path]
) -> None:
    model = tiny_checkpoint("llama")
    few, many = (
        check(model, write_plan("keep: 0.5\nmethod: two_sided_svd", samples=3, gradient_samples=n))
        for n in (3, 99)
    )
    assert few.memory.gradients == many.memory.gradients > 0
    without = check(model, write_plan("keep: 0.5\nmethod: svd", gradient_samples=3)).memory
    assert without.gradients == 0


def test_memory_counts_what_an_allocation_takes_before(
    tiny_checkpoint: TinyCheckpoint, write_plan: Callable[..., Path]
) -> None:
    """Gradients of every target where it predicts losses, the whole model where it measures them."""
    model = tiny_checkpoint("llama")
    uniform, energy, fisher, measured = (
        check(model, write_plan(f"keep: 0.6\nmethod: svd\nallocate: {name}", gradient_samples=3))
        for name in ("uniform", "energy", "fisher", "sensitivity")
    )
    assert uniform.memory.gradients == energy.memory.gradients == 0
    swept = check(model, write_plan("keep: 0.6\nmethod: two_sided_svd", gradient_samples=3)).memory
    assert fisher.memory.gradients == swept.gradients > 0
    assert measured.memory.peak > measured.before.bytes + uniform.memory.peak / 2
