"""The walk: every layer is loaded and run once, whoever observes it, and none stays."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrc.checkpoint.reader import CheckpointReader
from lrc.moments.moment import Moments
from lrc.moments.observe import Call
from lrc.moments.statistic import Observer
from lrc.plan.resolved import Assignment, LayerPlan
from lrc.run.processes import Processes
from lrc.run.stopwatch import Stopwatch
from lrc.walk.stream import Batch, ModelStream
from lrc.walk.walk import Walk

CPU = torch.device("cpu")
FAMILIES = ["llama", "gpt2"]


class Calls(Observer):
    """Keeps what the MLP of a layer puts out, block by block."""

    def __init__(self, stream: ModelStream, index: int) -> None:
        self.index, self._path = index, stream.reader.family.mlp
        self.outputs: list[Tensor] = []
        self.reduced = 0

    @property
    def watched(self) -> Collection[str]:
        return (self._path,)

    def add(self, calls: Mapping[str, Call]) -> None:
        assert not self.reduced
        self.outputs.append(calls[self._path].output.clone())

    def reduce(self, processes: Processes) -> None:
        self.reduced += 1


def open_stream(folder: Path) -> ModelStream:
    return ModelStream(CheckpointReader(folder), CPU, torch.float32)


def by_hand(stream: ModelStream, batches: list[Batch]) -> list[Tensor]:
    """Hidden states of all blocks behind every layer."""
    found, hidden = [], [batch.hidden for batch in batches]
    for index in range(len(stream.skeletons)):
        layer, _ = stream.layer(index)
        hidden = [stream.run(layer, index, b, x) for b, x in zip(batches, hidden, strict=True)]
        found.append(torch.cat(hidden))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("group", [1, 2, 3, 7])
def test_neighbouring_layers_are_visited_together(
    tiny_checkpoint: Any, blocks: Tensor, family: str, group: int
):
    """Observed or not, the batches end behind the last layer, and a layer's observers see that layer alone."""
    stream = open_stream(tiny_checkpoint(family, num_hidden_layers=5))
    batches = stream.embed(blocks.split(3))
    expected, seen, order = by_hand(stream, batches), list[Calls](), list[list[int]]()
    for number, visit in enumerate(Walk(stream, batches, group=group)):
        order.append([layer.index for layer in visit.layers])
        assert visit.index == order[-1][0]
        if number % 2 == 0:
            mine = [Calls(stream, index) for index in order[-1]]
            visit.observe(*mine)
            torch.testing.assert_close(torch.cat([b.hidden for b in batches]), expected[order[-1][-1]])
            seen += mine
    assert order == [list(range(s, min(s + group, 5))) for s in range(0, 5, group)]
    assert torch.equal(torch.cat([batch.hidden for batch in batches]), expected[-1])
    again = stream.embed(blocks.split(3))
    for calls in seen:
        assert [len(output) for output in calls.outputs] == [3, 1]
        assert calls.reduced == 1
    for index in range(5):  # what each observer saw is what its own layer puts out
        layer, _ = stream.layer(index)
        watched = Calls(stream, index)
        stream.advance(layer, index, again, watched)
        for calls in seen:
            same = torch.equal(torch.cat(calls.outputs), torch.cat(watched.outputs))
            assert same == (calls.index == index)


def test_a_walk_may_end_early_and_run_layers_that_are_held(tiny_checkpoint: Any, blocks: Tensor) -> None:
    stream = open_stream(tiny_checkpoint("llama", num_hidden_layers=4))
    batches = stream.embed(blocks.split(2))
    expected, loaded = by_hand(stream, batches), []

    def load(index: int) -> Any:
        loaded.append(index)
        return stream.layer(index)

    watch = Stopwatch(CPU)
    for visit in Walk(stream, batches, end=3, load=load, watch=watch):
        assert loaded == list(range(visit.index + 1))
    assert loaded == [0, 1, 2]
    assert torch.equal(torch.cat([batch.hidden for batch in batches]), expected[2])
    assert list(watch.seconds) == ["load", "observe"]


@pytest.mark.parametrize("group", [1, 2])
def test_layers_go_before_the_next_are_loaded(tiny_checkpoint: Any, blocks: Tensor, group: int) -> None:
    """Also those of a visit that the loop still has a name for, and the moments with whoever held them."""
    stream = open_stream(tiny_checkpoint("llama", num_hidden_layers=4))
    modules, moments = dict[int, Any](), list[Any]()

    def load(index: int) -> Any:
        first = index // group * group
        assert not [there for there, module in modules.items() if there < first and module() is not None]
        assert not [moment for moment in moments if moment() is not None]
        module, state = stream.layer(index)
        modules[index] = weakref.ref(module)
        return module, state

    def look(visit: Any) -> None:
        statistic = Moments(visit.layers[0], ["qk", "mlp"])
        visit.observe(statistic)
        result = statistic.result()
        moments.extend(weakref.ref(moment) for moment in result.values())
        assert moments[-1]() is result["mlp"]

    for visit in Walk(stream, stream.embed(blocks.split(2)), group=group, load=load):
        look(visit)
    assert len(modules) == 4


def test_solvers_read_the_moments_and_the_batches_move_on_once(tiny_checkpoint: Any, blocks: Tensor) -> None:
    stream = open_stream(tiny_checkpoint("gpt2"))
    batches = stream.embed(blocks.split(2))
    plan = LayerPlan(0, (Assignment("o", "svd", 1, {}, 1, 2),))
    visit = next(iter(Walk(stream, batches)))
    found = visit.read(plan, None, targets=["fc_out"])
    assert found.keys() == {"moments"}
    assert found["moments"].keys() == {"o", "fc_out"}
    with pytest.raises(AssertionError, match="passed the last layer already"):
        visit.observe()
