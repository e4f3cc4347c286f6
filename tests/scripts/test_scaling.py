"""The cost model's counts against what a compression really does, stage by stage."""

from __future__ import annotations

import importlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lrc.checkpoint.staging import staging
from lrc.compression import refit
from lrc.compression.loop import Compressor
from lrc.moments import moment
from lrc.plan.job import prepare
from lrc.run.stopwatch import Stopwatch
from lrc.walk.stream import ModelStream

aten = torch.ops.aten


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("scaling")


class Watch(Stopwatch):
    """Knows which stage it is in."""

    now = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.now = name
        with super().stage(name):
            yield


class Operations(TorchDispatchMode):
    """Counts by stage: products by ``torch.utils.flop_counter``, those in float64 apart, and factorizations by size."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.found: dict[str, Counter[Any]] = defaultdict(Counter)
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for key, amount in self._count(func.overloadpacket, args, kwargs or {}, out):
            self.found[self._watch.now][key] += amount
        return out

    def _count(self, op: Any, args: Any, kwargs: Any, out: Any) -> Iterator[tuple[Any, int]]:
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if op is aten._scaled_dot_product_flash_attention_for_cpu:
            yield "products", sdpa_flop_count(args[0].shape, args[0].shape, args[0].shape)
        elif op is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            yield "products", sdpa_backward_flop_count(*[args[0].shape] * 4)
        elif op in flop_registry:
            kind = "double" if out.dtype == torch.float64 else "products"
            yield kind, flop_registry[op](*args, **kwargs, out_val=out)
        elif first is not None and op in FACTORIZATIONS:
            yield (FACTORIZATIONS[op], first.shape[-1]), prod(first.shape[:-2])
        elif op is aten.linalg_qr:
            rows, columns = first.shape  # type: ignore[union-attr]
            yield "qr", 4 * rows * columns**2 - 4 * columns**3 // 3
        elif op is aten.linalg_solve_triangular:
            yield "double", first.numel() * args[1].shape[-1]  # type: ignore[union-attr]
        elif op is aten.cholesky_solve:
            yield "double", 2 * args[1].numel() * first.shape[-1]  # type: ignore[union-attr]


FACTORIZATIONS = {
    aten.linalg_cholesky_ex: "cholesky",
    aten._linalg_eigh: "eigh",
    aten._linalg_svd: "svd",
}


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_counts_are_those_of_a_run(
    scaling: ModuleType,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kv_heads: int,
) -> None:
    monkeypatch.setattr("lrc.walk.backward._KEEP_ALL", 0)  # inputs of some layers are computed again
    for name, module, value in (
        ("DIRECTIONS", refit, 16),
        ("GRAM_BLOCK", moment, 48),
    ):  # as wide models need them
        monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(scaling, name, value)
    model = tiny_checkpoint("llama", num_hidden_layers=5, num_key_value_heads=kv_heads)
    plan = tmp_path / "plan.yaml"
    calibration = {"samples": 16, "gradient_samples": 6, "seq_len": 64}
    plan.write_text(f"format: 1\nkeep: 0.7\ncalibration: {json.dumps(calibration)}\n", encoding="utf-8")
    job, device = prepare(model, plan), torch.device("cpu")
    watch = Watch(device)
    operations = Operations(watch)
    with (
        staging(tmp_path / "out", {}, source=model, fresh=False, force=False) as stage,
        operations,
    ):
        stream = ModelStream(job.reader, device, torch.float32)
        blocks = torch.randint(0, 256, (16, 64))
        Compressor(stream, job.plan, stage, watch).run(blocks, 4, lambda: None)
    shape, run = scaling.shape_of(job, low=False), scaling.Run(blocks=16, gradient_blocks=6, batch=4)
    for name, counted in scaling.count(shape, run).items():
        total = sum((work for group in counted.spread for work in group), Counter(counted.own))
        expected = {key: n for key, n in total.items() if not isinstance(key, str) or key in ("double", "qr")}
        expected["products"] = total["products"] + total["sums"]
        found = operations.found[name]
        if name == "scale":  # by how many steps it took
            steps, rest = divmod(found["products"], 2 * run.held * 64 * shape.vocab * shape.hidden)
            assert steps > 2
            assert rest == 0
        elif name == "solve" and kv_heads < shape.heads:  # rounds for shared heads are not counted
            assert Counter(expected) - found == {}
        elif name in ("gradients", "observe", "solve", "measure", "refit"):
            assert found == {key: n for key, n in expected.items() if n}


def test_processes_share_blocks_and_solves(scaling: ModuleType) -> None:
    shape = scaling.Shape(
        layers=2,
        hidden=64,
        heads=4,
        kv_heads=4,
        head_dim=16,
        vocab=256,
        mlps=(scaling.Mlp(176, 140, copies=6, active=2), scaling.Mlp(176, 140)),
        q_rank=25,
        k_rank=25,
        ov_rank=12,
        seq=32,
        stored=2,
        low=True,
    )
    rates = scaling.h200(1)
    one, four = (scaling.count(shape, scaling.Run(blocks=32, gradient_blocks=8, gpus=n)) for n in (1, 4))
    for name in ("gradients", "observe", "measure", "refit"):
        assert one[name].own["products"] == 4 * four[name].own["products"] > 0
        assert one[name].own["network"] == 0
    assert four["observe"].own["network"] == 2 * 2 * 4 * (2 * 64**2 + 7 * 176**2) * 3 // 4
    (group,) = one["solve"].spread  # q, k, values, seven MLPs
    waited = [sum(scaling.by_unit(scaling._longest(group, n, rates), rates).values()) for n in (1, 4, 10)]
    alone = [sum(scaling.by_unit(work, rates).values()) for work in group]
    assert waited[0] == pytest.approx(sum(alone))
    assert waited[1] == pytest.approx(max(alone[:4]) + max(alone[4:8]) + max(alone[8:]))
    assert waited[2] == max(alone)


def test_experts_hold_the_weights_that_are_named(scaling: ModuleType) -> None:
    """A trillion weights, of which a token passes 32 billion."""
    config = scaling.AutoConfig.for_model(**scaling.EXPERT)
    config.dtype = torch.bfloat16
    with scaling.prepared(config, scaling.Run()) as job:
        shape = scaling.with_experts(scaling.shape_of(job, low=True))
    assert shape.layers * shape.layer + shape.tables == pytest.approx(1.04e12, rel=0.01)
    assert shape.layers * shape.passed + shape.tables == pytest.approx(35e9, rel=0.1)
