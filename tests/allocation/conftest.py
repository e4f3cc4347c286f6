"""What tests of allocations share: plans resolved for tiny models, and a setting with text to find costs on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lrc.allocation.contract import Setting
from lrc.allocation.sizing import Limits
from lrc.allocation.spend import Curve, Offer
from lrc.calibration.draw import Texts
from lrc.checkpoint.reader import CheckpointReader
from lrc.methods import methods
from lrc.moments import collectors
from lrc.moments.gradient import GradientMoment, GradientTargets
from lrc.plan.resolve import parse_plan, resolve
from lrc.plan.resolved import ResolvedPlan
from lrc.text.corpus import Drawn, Source
from lrc.walk.backward import GradientSweep
from lrc.walk.needs import solver_of
from lrc.walk.stream import ModelStream


def resolved(reader: CheckpointReader, text: str) -> ResolvedPlan:
    draft = parse_plan(f"format: 1\n{text}", "p.yaml")
    return resolve(draft, reader.architecture, methods(), collectors())


@pytest.fixture
def setting(blocks: Tensor) -> Callable[..., Setting]:
    """Makes settings from a checkpoint folder, a plan, the kept fractions at which it is resolved, and whether every
    problem has gradients.
    """

    def make(folder: Path, plan: str, keeps: Sequence[float] = (0.3, 0.6), losses: bool = False) -> Setting:
        reader = CheckpointReader(folder)
        plans = [resolved(reader, f"keep: {keep}\n{plan}") for keep in keeps]
        texts = Texts(Drawn((Source("drawn", blocks, {}),), None, blocks))
        return Setting(reader, plans, texts, torch.device("cpu"), torch.float32, 2, losses)

    return make


@pytest.fixture
def offered() -> Callable[..., list[Offer]]:
    """Gives what may be bought of a setting's curves: every legal size, or those within limits."""

    def make(setting: Setting, curves: Sequence[Curve], limits: Limits | None = None) -> list[Offer]:
        architecture, found = setting.reader.architecture, []
        targets = architecture.targets | architecture.outer
        for curve in curves:
            one = next(a for a in setting.plans[0].unsized(curve.layer) if a.target == curve.target)
            rule = solver_of(one).size
            limited = limits or Limits(round_to=1)
            found.append(limited.on(curve, rule, targets[curve.target], one.options, 4))
        return found

    return make


@pytest.fixture
def gradients(blocks: Tensor) -> Callable[[Path], dict[int, GradientMoment]]:
    """Gives the gradient moments of every projection of a model, by layer."""

    def sweep(folder: Path) -> dict[int, GradientMoment]:
        stream = ModelStream(CheckpointReader(folder), torch.device("cpu"), torch.float32)
        architecture = stream.reader.architecture
        wanted = dict.fromkeys(range(architecture.layers), GradientTargets(frozenset(architecture.matrices)))
        return GradientSweep(stream, blocks, len(blocks)).run(wanted, seed=0)

    return sweep
