"""A new statistic is one new file: its solver names it, and every walk gathers it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lrc.methods
import lrc.moments
from lrc.allocation import ALLOCATORS
from lrc.allocation.contract import Setting
from lrc.allocation.spend import Curve
from lrc.calibration.draw import Texts
from lrc.checkpoint.reader import CheckpointReader
from lrc.methods import methods
from lrc.moments import collectors, statistics
from lrc.plan.resolve import parse_plan, resolve
from lrc.text.corpus import Drawn, Source
from lrc.walk.stream import ModelStream
from lrc.walk.walk import Walk

PEAKS = '''"""Largest absolute value of every input of a projection."""

from __future__ import annotations

import torch

from lrc.moments.statistic import Statistic


class Peaks(Statistic):
    name = "peaks"

    def __init__(self, layer, targets):
        super().__init__(layer, targets)
        family = layer.architecture.family
        self._paths = {target: family.projections[target].module for target in self.targets}
        self._peaks = {target: torch.zeros((), device=layer.device) for target in self.targets}

    @property
    def watched(self):
        return self._paths.values()

    def add(self, calls):
        for target, path in self._paths.items():
            x = calls[path].input.to(self.layer.dtype)
            self._peaks[target] = torch.maximum(self._peaks[target], x.abs().amax(dim=(0, 1)))

    def reduce(self, processes):
        for target, peaks in self._peaks.items():
            self._peaks[target] = torch.stack(processes.gather(peaks)).amax(dim=0)

    def result(self):
        return self._peaks
'''

LOUDEST = '''"""Keep the inputs that are ever largest."""

from __future__ import annotations

import torch

from lrc.methods.contract import Factors, Prediction, ProjectionProblem, Solution, solves
from lrc.methods.sizes import PairRank


@solves("projection", size=PairRank(), needs=("moments", "peaks"), exact=False, paper="none")
def solve_projection(problem: ProjectionProblem, rank: int) -> Solution:
    """Drop the columns of all inputs but the ``rank`` largest."""
    weight, peaks = problem.matrix.weight.double(), problem.statistics["peaks"].double()
    kept = peaks.topk(rank).indices
    rows = torch.zeros(rank, weight.shape[1]).double()
    rows[range(rank), kept] = 1
    factors = Factors("low_rank", {"A": rows, "B": weight[:, kept]}, problem.matrix.bias)
    return Solution({problem.role: factors}, Prediction(float(peaks.sum()), 1.0, "output"))
'''


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One new file in each of two folders, found by scan as those that are shipped."""
    for package, name, text in ((lrc.moments, "peaks", PEAKS), (lrc.methods, "loudest", LOUDEST)):
        folder = tmp_path / f"more-{name}"
        folder.mkdir()
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    statistics.cache_clear()
    methods.cache_clear()
    yield
    for module in ("lrc.moments.peaks", "lrc.methods.loudest"):
        sys.modules.pop(module, None)
    statistics.cache_clear()
    methods.cache_clear()


def energy(folder: Path, plan: str, blocks: Tensor) -> tuple[Setting, list[Curve]]:
    """What sizes of a plan cost by the methods' own predictions, and what that was worked out from."""
    reader = CheckpointReader(folder)
    draft = parse_plan(f"format: 1\nkeep: 0.5\n{plan}", "p.yaml")
    plans = [resolve(draft, reader.architecture, methods(), collectors())]
    texts = Texts(Drawn((Source("drawn", blocks, {}),), None, blocks))
    setting = Setting(reader, plans, texts, torch.device("cpu"), torch.float32, 2)
    return setting, ALLOCATORS["energy"].curves(setting, lambda done: None)[0]


def test_the_scan_finds_what_is_shipped() -> None:
    assert set(statistics()) == {"moments", "attention", "attention_samples"}
    assert collectors() == {*statistics(), "gradients"}


def tensors(found: object) -> Iterator[Tensor]:
    """Every tensor of a result, in order."""
    if isinstance(found, Tensor):
        yield found
    elif is_dataclass(found):
        for field in fields(found):
            yield from tensors(getattr(found, field.name))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", sorted(statistics()))
def test_batches_of_any_size_add_up(tiny_checkpoint: Any, blocks: Tensor, family: str, name: str) -> None:
    """Every target has a result, the same to rounding, from the watched calls alone."""
    stream = ModelStream(CheckpointReader(tiny_checkpoint(family)), torch.device("cpu"), torch.float32)
    targets = list(stream.reader.architecture.targets)
    one, other = {}, {}
    for size, found in ((1, one), (3, other)):
        for visit in Walk(stream, stream.embed(blocks.split(size)), first_token=5):
            statistic = statistics()[name](visit.layer, targets)
            visit.observe(statistic)
            found[visit.index] = statistic.result()
    for index in range(2):
        assert list(one[index]) == targets
        for target in targets:
            pairs = list(zip(tensors(one[index][target]), tensors(other[index][target]), strict=True))
            assert pairs
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_solver_reads_a_statistic_of_a_new_file(
    tiny_checkpoint: Any, blocks: Tensor, linear_inputs: Any, added: None, family: str
) -> None:
    assert "peaks" in collectors()
    folder = tiny_checkpoint(family)
    setting, curves = energy(folder, "method: loudest", blocks)
    inputs, described = linear_inputs(folder), setting.reader.family
    assert len(curves) == 2 * len(described.projections)
    for curve in curves:
        path = described.projections[curve.target].module
        peaks = inputs[f"{described.layers}.{curve.layer}.{path}"].abs().amax(dim=0)
        expected = float(peaks.sum()) * curve.whole / setting.plans[0].budget.whole
        assert curve.costs == pytest.approx([expected] * len(curve.sizes), rel=1e-5)


def test_it_is_gathered_only_where_a_solver_names_it(
    tiny_checkpoint: Any, blocks: Tensor, added: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, tuple[str, ...]]] = []
    peaks = statistics()["peaks"]
    start = peaks.__init__

    def note(self: Any, layer: Any, targets: Any) -> None:
        start(self, layer, targets)
        made.append((self.index, self.targets))

    monkeypatch.setattr(peaks, "__init__", note)
    plan = "method: svd\nlayers: [{match: 1, up: {method: loudest}}]"
    energy(tiny_checkpoint("llama"), plan, blocks)
    assert made == [(1, ("up",))]
