"""The one walk over a model's layers: each is loaded once and runs once on all batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from lrc.moments.gradient import GRADIENTS, GradientMoment
from lrc.moments.statistic import Found, Layer, Observer
from lrc.plan.resolved import LayerPlan
from lrc.run.stopwatch import Stopwatch
from lrc.walk.needs import statistics_needed
from lrc.walk.stream import Batch, ModelStream

Load = Callable[[int], tuple[nn.Module, Mapping[str, Tensor]]]
Stage = Callable[[str], AbstractContextManager[object]]


class Walk:
    """Visit the first ``end`` layers (default: all), ``group`` neighbours at a time, and take ``batches`` past them.

    Layers that a visit has not observed are run when the loop goes on. The visit then drops its layers, so that only
    those of one visit are on the device. ``load`` gives layers that are held elsewhere. The first token of a block
    counts as ``first_token`` in moments. ``watch`` times the stages ``load`` and ``observe``.
    """

    def __init__(
        self,
        stream: ModelStream,
        batches: Sequence[Batch],
        *,
        end: int | None = None,
        group: int = 1,
        first_token: int = 1,
        load: Load | None = None,
        watch: Stopwatch | None = None,
    ) -> None:
        self._stream, self._batches, self._first_token = stream, batches, first_token
        self._end, self._group = len(stream.skeletons) if end is None else end, group
        self._load: Load = load or stream.layer
        self._stage: Stage = watch.stage if watch else _untimed

    def __iter__(self) -> Iterator[Visit]:
        for start in range(0, self._end, self._group):
            with self._stage("load"):
                layers = {i: self._load(i) for i in range(start, min(start + self._group, self._end))}
            visit = Visit(self._stream, layers, self._batches, self._first_token, self._stage)
            del layers
            yield visit
            visit.leave()


class Visit:
    """Neighbouring layers of the original on the device, and the batches in front of them or, once run, behind them."""

    def __init__(
        self,
        stream: ModelStream,
        layers: Mapping[int, tuple[nn.Module, Mapping[str, Tensor]]],
        batches: Sequence[Batch],
        first_token: int,
        stage: Stage,
    ) -> None:
        self._stream, self._loaded, self._first_token, self._stage = stream, layers, first_token, stage
        self._observed = False
        self.batches = batches

    @property
    def layers(self) -> list[Layer]:
        """The layers, in order."""
        stream = self._stream
        architecture, where = stream.reader.architecture, (stream.device, stream.dtype, stream.processes)
        return [
            Layer(architecture, index, module, state, *where, self._first_token)
            for index, (module, state) in self._loaded.items()
        ]

    @property
    def layer(self) -> Layer:
        """The only layer, where the walk visits one at a time."""
        (layer,) = self.layers
        return layer

    @property
    def index(self) -> int:
        """Number of the first layer."""
        return next(iter(self._loaded))

    def observe(self, *observers: Observer) -> None:
        """Run the layers once on all batches, feed each observer the calls of its layer, and move the batches past."""
        with self._stage("observe"):
            self._run(observers)

    def read(
        self,
        plan: LayerPlan,
        gradients: GradientMoment | None,
        *beside: Observer,
        targets: Iterable[str] = (),
    ) -> Found:
        """Observe what the solvers of the only layer need, and return it together with the gradients of a sweep.

        ``beside``: more observers. ``targets``: more targets to take moments for. Raise UserError where activations are
        NaN or inf.
        """
        with self._stage("observe"):
            needed = statistics_needed(self.layer, plan, targets)
            self._run([*needed, *beside])
            found = {statistic.name: statistic.result() for statistic in needed}
            del needed  # with the sums, before gradients take their room
            if gradients is None:
                return found
            fetched = gradients.moved(self._stream.fetch)
            return found | {GRADIENTS: fetched.by_target(self._stream.reader.family)}

    def leave(self) -> None:
        """Run the layers if they have not been observed, and drop them."""
        if not self._observed:
            self.observe()
        self._loaded = {}

    def _run(self, observers: Sequence[Observer]) -> None:
        assert not self._observed, "the batches are behind the layers already"
        assert {observer.index for observer in observers} <= self._loaded.keys(), (
            "an observer of another layer"
        )
        self._observed = True
        for index, (module, _) in self._loaded.items():
            here = [observer for observer in observers if observer.index == index]
            self._stream.advance(module, index, self.batches, *here)


def _untimed(_: str) -> AbstractContextManager[None]:
    return nullcontext()
