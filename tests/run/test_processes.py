"""What processes exchange, how they fail together, and that split sums are those of one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrc.allocation import ALLOCATORS
from lrc.allocation.contract import Setting
from lrc.calibration.draw import Texts
from lrc.calibration.synthetic import write_blocks
from lrc.checkpoint.reader import CheckpointReader
from lrc.checkpoint.staging import SharedStaging, staging
from lrc.compression.embedding import final_moment
from lrc.compression.logit_scale import Final, fit_channels, fit_scale
from lrc.compression.ridge import RefitSum
from lrc.compression.solve import solve_layer
from lrc.errors import OutOfResources, ProcessEnded, UserError
from lrc.families import Architecture
from lrc.hub.loader import load
from lrc.methods import methods
from lrc.methods.contract import Affine
from lrc.moments import collectors
from lrc.moments.attention_samples import SAMPLES, SampleSum
from lrc.moments.gradient import GradientTargets
from lrc.plan.resolve import parse_plan, resolve
from lrc.plan.resolved import ResolvedPlan
from lrc.run.processes import ALONE, Processes, launched
from lrc.text.blocks import batched
from lrc.text.corpus import Drawn, Source
from lrc.walk.backward import GradientSweep
from lrc.walk.stream import ModelStream
from lrc.walk.walk import Walk

Together = Callable[..., list[Any]]
TinyCheckpoint = Callable[..., Path]

CPU = torch.device("cpu")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def values(ended: list[Any]) -> list[Any]:
    for each in ended:
        assert each.code == 0, each.err
    return [each.value for each in ended]


# What they exchange


def exchange() -> dict[str, Any]:
    with launched() as processes:
        summed = [normal(processes.rank, 3, 4), torch.full((2,), processes.rank + 1.0, dtype=torch.float64)]
        processes.sum(*summed)
        sent = {
            "bfloat16": normal(processes.rank, 2, 3).bfloat16(),
            "turned": normal(processes.rank, 3, 2).T,
            "none": torch.empty(0, 5),
            "one": torch.tensor(processes.rank),
            "rest": [processes.rank, None],
        }
        own = processes.mine(torch.arange(7))
        return {
            "sum": summed,
            "total": (processes.total(processes.rank + 1), processes.total(normal(processes.rank, 100))),
            "gather": processes.gather(sent),
            "share": processes.share(sent if processes.rank == 1 else {}, 1),
            "mine": (own, list(processes.mine(range(7)))),
            "gather_rows": processes.gather_rows(own.unsqueeze(1)),
            "spread": list(processes.spread([10, 11, 12, 13], lambda item: (item, processes.rank))),
        }


def test_what_is_exchanged_arrives_whole_and_alike(together: Together) -> None:
    found = values(together(exchange, size=3))
    torch.testing.assert_close(found[0]["sum"][0], sum(normal(rank, 3, 4) for rank in range(3)))
    for each in found:
        assert each["sum"][1].tolist() == [6.0, 6.0]
        assert each["total"][0] == 6
        assert torch.equal(each["total"][1], found[0]["total"][1])
        for rank, sent in enumerate(each["gather"]):
            assert torch.equal(sent["bfloat16"], normal(rank, 2, 3).bfloat16())
            assert torch.equal(sent["turned"], normal(rank, 3, 2).T)
            assert sent["none"].shape == (0, 5)
            assert sent["one"].tolist() == rank
            assert sent["rest"] == [rank, None]
        assert torch.equal(each["share"]["turned"], normal(1, 3, 2).T)
        assert each["gather_rows"].flatten().tolist() == list(range(7))
        assert each["spread"] == [(10, 0), (11, 1), (12, 2), (13, 0)]
    assert [each["mine"][1] for each in found] == [[0, 3, 6], [1, 4], [2, 5]]


def test_alone_everything_is_what_it_was() -> None:
    tensor = normal(0, 5)
    before = tensor.clone()
    ALONE.sum(tensor)
    assert torch.equal(tensor, before)
    for same in (ALONE.total(tensor), ALONE.share(tensor), ALONE.gather_rows(tensor), *ALONE.gather(tensor)):
        assert same is tensor
    assert torch.equal(ALONE.mine(tensor), tensor)
    assert list(ALONE.spread([1, 2], lambda item: item + 1)) == [2, 3]
    ALONE.meet()
    with launched() as processes:
        assert processes is ALONE


# How they fail


def failing(kind: str) -> str:
    try:
        with launched() as processes:
            if processes.rank == 1:
                if kind == "gone":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise UserError("no such text") if kind == "mistake" else ValueError("a bug")
            while True:
                processes.share(None)
    except (UserError, ValueError) as error:
        missed = isinstance(error, ProcessEnded) and not error.reported
        return f"{type(error).__name__} {missed}: {error}"


def test_a_mistake_in_one_is_raised_in_all(together: Together) -> None:
    assert values(together(failing, "mistake", size=3)) == ["UserError False: no such text"] * 3


def test_a_failure_of_ours_stays_where_it_was_and_is_told_to_the_others(together: Together) -> None:
    first, second = values(together(failing, "bug"))
    assert second == "ValueError False: a bug"
    assert first.startswith("OutOfResources False: process 1 of 2 failed with ValueError: a bug")


def test_a_process_that_is_gone_is_missed_at_once_and_told_of_once(together: Together) -> None:
    first, gone, third = together(failing, "gone", size=3)
    assert gone.code == -signal.SIGKILL
    told = [first.value, third.value]
    assert all("another of the 3 processes of this run ended" in each for each in told)
    assert all("run the same command again" in each for each in told)
    assert sorted(each.split(":")[0] for each in told) == ["ProcessEnded False", "ProcessEnded True"]


def test_what_stops_a_run_but_is_no_mistake_leaves_what_is_finished() -> None:
    assert issubclass(ProcessEnded, OutOfResources)


def disagreeing() -> str:
    try:
        with launched() as processes:
            processes.agree({"model": "m", "calibration": {"seed": processes.rank}})
    except UserError as error:
        return str(error)
    return ""


def staged(folder: Path) -> tuple[list[bool], dict[str, Any]]:
    """What the second process alone asks of a staging folder that an earlier run left, and what both then read."""
    with launched() as processes:
        opened = staging(folder / "out", {}, source=folder / "m", fresh=False, force=False)
        with opened if processes.first else nullcontext() as own:
            stage = SharedStaging(own, processes)
            asked = [stage.has("old"), stage.has("new")] if not processes.first else []
            stage.write("new", {"w": torch.ones(1)} if processes.first else {}, {})
            asked += [] if processes.first else [stage.has("new")]
            return asked, stage.record("old")


def test_a_process_may_ask_alone_what_is_staged(tmp_path: Path, together: Together) -> None:
    with staging(tmp_path / "out", {}, source=tmp_path / "m", fresh=False, force=False) as own:
        own.write("old", {"w": torch.zeros(1)}, {"rank": 3})
    first, second = values(together(staged, tmp_path))
    assert first == ([], {"rank": 3})
    assert second == ([True, False, True], {"rank": 3})


def test_processes_that_see_other_files_are_refused(together: Together) -> None:
    for told in values(together(disagreeing)):
        assert told.startswith("process 1 would run with another calibration than process 0")


# Split sums are those of one process

PLAN = "format: 1\nkeep: 0.5\nmethod: a3\ncomponents: {qk: {metric: attention, keep: 0.5}}\n"
ALS = "format: 1\nkeep: 0.5\nmethod: a3\ncomponents: {qk: {metric: attention_als, keep: 0.5}}\n"


def blocks(count: int) -> Tensor:
    """Blocks of a few words over and over, so that inputs are correlated."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 256, (12, 4), generator=generator)
    return words[torch.randint(0, 12, (count, 8), generator=generator)].flatten(1)


def resolved(architecture: Architecture, text: str) -> ResolvedPlan:
    return resolve(parse_plan(text, "p.yaml"), architecture, methods(), collectors())


def sums(processes: Processes, folder: Path, text: str, count: int) -> dict[str, Tensor]:
    """Everything that is summed over blocks, in one dictionary, and what the first layer's methods keep by it."""
    stream = ModelStream(CheckpointReader(folder), CPU, torch.float32, processes=processes)
    architecture = stream.reader.architecture
    plan = resolved(architecture, text).layers[0]
    ids = blocks(count)
    batches = stream.embed(batched(processes.mine(ids), 2))
    wanted = {
        index: GradientTargets(frozenset(architecture.matrices), True) for index in range(architecture.layers)
    }
    gradients = GradientSweep(stream, ids, 2).run(wanted, 0)
    found = {
        f"{index} {role}": tensor for index, g in gradients.items() for role, tensor in g.outputs.items()
    }
    found |= {f"{index} queries": g.queries for index, g in gradients.items() if g.queries is not None}
    visit = next(iter(Walk(stream, [replace(batch) for batch in batches], first_token=8)))
    statistics = visit.read(plan, gradients[0])
    for target, moment in statistics["moments"].items():
        means = {f"{target} mean": moment.mean, f"{target} n": torch.tensor(moment.tokens)}
        found |= {f"{target} moment": moment.second} | means
    for attention in statistics.get("attention", {}).values():
        found["covariance"] = attention.covariance
        if attention.pairs is not None:
            found["pairs"] = attention.pairs
    for samples in statistics.get("attention_samples", {}).values():
        found |= {"q": samples.q, "of q": samples.covariance}
    found["final"] = final_moment(stream, [batch.hidden for batch in batches]).second
    refit = RefitSum(architecture.hidden, architecture.hidden, CPU)
    numbers = iter(processes.mine(range(count)))
    for block in (block for batch in batches for block in batch.hidden.split(1)):
        number = next(numbers)
        refit.add(block, 2 * block + 0.1 * normal(number, *block.shape), block, held=number == count - 1)
    refit.reduce(processes)
    start = Affine(torch.zeros(architecture.hidden, architecture.hidden))
    ((fitted, _),) = processes.spread([start], lambda each: refit.solve(each, 0, "o"))
    found["refit"] = fitted.weight
    finals = (
        Final([batch.hidden for batch in batches], stream.tail()),
        Final([batch.hidden * 1.2 for batch in batches], stream.tail()),
    )
    scale = fit_scale(*finals, architecture.vocab, processes)
    factors, _ = fit_channels(*finals, scale, architecture.hidden, architecture.vocab, processes)
    found["channels"] = factors
    found["scale"] = torch.tensor([scale.value, scale.before, scale.after, scale.tokens])
    for target, solution in solve_layer(architecture, plan, visit.layer.state, statistics, processes).items():
        if solution.rotary_columns is not None:
            found[f"{target} columns"] = solution.rotary_columns
        if target == "mlp":
            part = solution.parts[architecture.family.mlp_inputs[0]]
            assert isinstance(part, Affine)
            found["mlp inputs"] = part.weight
    return found


def sums_of_several(folder: Path, text: str, count: int) -> dict[str, Tensor]:
    with launched() as processes:
        return sums(processes, folder, text, count)


@pytest.mark.parametrize(
    ("family", "text", "count", "size"),
    [
        ("llama", PLAN, 7, 2),
        ("gpt2", ALS, 7, 2),
        ("llama", PLAN, 2, 3),
    ],
    ids=["two", "two, with sampled queries", "more processes than blocks"],
)
def test_sums_and_what_is_kept_by_them(
    family: str, text: str, count: int, size: int, tiny_checkpoint: TinyCheckpoint, together: Together
) -> None:
    folder = tiny_checkpoint(family)
    expected, several = (
        sums(ALONE, folder, text, count),
        values(together(sums_of_several, folder, text, count, size=size)),
    )
    assert {"qk moment", "mlp moment", "final", "refit", "scale", "mlp inputs", "0 o"} <= set(expected)
    assert ("q" in expected) == (text == ALS)
    for name, tensor in expected.items():
        for found in several:
            if tensor.is_floating_point():
                off = (found[name] - tensor).norm() / tensor.norm()
                assert off < 1e-5, f"{name} is off by {off:.1e}"
            else:
                assert torch.equal(found[name], tensor), name
    for name in ("refit", "scale"):  # decided by one, or by the same bits
        assert all(torch.equal(found[name], several[0][name]) for found in several)


def sampled(count: int) -> Tensor:
    with launched() as processes:
        total = SampleSum(1.0, processes)
        for number in processes.mine(range(count)):
            total.add(torch.full((4, 16, 2), float(number)), normal(number, 1, 16, 2), None)
        total.reduce(processes)
        return total.moment().q[0, 0, ::16, 0]


@pytest.mark.parametrize("count", [15, 33, 70])
def test_the_queries_kept_are_those_that_one_process_keeps(count: int, together: Together) -> None:
    alone = sampled(count)
    assert len(alone) * 4 * 16 <= SAMPLES
    assert alone.tolist() == sorted(alone.tolist())
    for found in values(together(sampled, count, size=3)):
        assert torch.equal(found, alone)


# Allocations and texts


def curves(processes: Processes, folder: Path) -> Iterator[tuple[str, list[float]]]:
    reader, ids = CheckpointReader(folder), blocks(7)
    texts = Texts(Drawn((Source("drawn", ids[:4], {}),), None, ids[:4]), Drawn((), None, ids[4:]))
    tables = "projections: {embed: {method: whitened_svd}}\n"
    for name, base, losses in (
        ("energy", f"method: a3\n{tables}", False),
        ("fisher", "method: two_sided_svd\n", True),
        ("importance", "method: svd\n", True),
        ("sensitivity", f"method: a3\n{tables}", False),
    ):
        head = f"format: 1\nallocate: {name}\n"
        plans = [resolved(reader.architecture, f"{head}keep: {keep}\n{base}") for keep in (0.3, 0.6)]
        setting = Setting(reader, plans, texts, CPU, torch.float32, 2, losses, processes=processes)
        done: list[int] = []
        found, _ = ALLOCATORS[name].curves(setting, done.append)
        yield name, [cost for curve in found for cost in curve.costs]


def curves_of_several(folder: Path) -> dict[str, list[float]]:
    with launched() as processes:
        return dict(curves(processes, folder))


def test_allocations_find_the_same_costs(tiny_checkpoint: TinyCheckpoint, together: Together) -> None:
    folder = tiny_checkpoint("llama")
    expected = dict(curves(ALONE, folder))
    first, second = values(together(curves_of_several, folder))
    assert first == second
    for name, costs in expected.items():
        assert first[name] == pytest.approx(costs, rel=1e-3, abs=1e-6), name


def written(folder: Path) -> Tensor:
    with launched() as processes:
        return write_blocks(load(folder), 3, 5, 8, 2, 2, lambda done: None, processes)


def test_the_model_writes_the_same_blocks(tiny_checkpoint: TinyCheckpoint, together: Together) -> None:
    folder = tiny_checkpoint("gpt2")
    expected = write_blocks(load(folder), 3, 5, 8, 2, 2, lambda done: None)
    for found in values(together(written, folder)):
        assert torch.equal(found, expected)
