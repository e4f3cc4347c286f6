"""Walk over a model's layers: load each once and run it once on all batches."""

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
    """Visit the first ``end`` layers (default: all), ``group`` at a time, and run ``batches`` through them, in place.

    After each iteration the visit runs its layers if it has not yet, and frees them. ``load`` replaces reading layers
    from the checkpoint. The first token of a block has weight ``first_token`` in moments. ``watch`` times the stages
    ``load`` and ``observe``.
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
        self.stream, self.batches, self.first_token = stream, batches, first_token
        self._end, self._group = len(stream.skeletons) if end is None else end, group
        self._load: Load = load or stream.layer
        self.stage: Stage = watch.stage if watch else lambda _: nullcontext()

    def __iter__(self) -> Iterator[Visit]:
        for start in range(0, self._end, self._group):
            with self.stage("load"):
                layers = {i: self._load(i) for i in range(start, min(start + self._group, self._end))}
            visit = Visit(self, layers)
            del layers
            yield visit
            if not visit.observed:
                visit.observe()
            visit.loaded = {}


class Visit:
    """Consecutive layers on the device, and the batches at their input or, once run, at their output."""

    def __init__(self, walk: Walk, layers: Mapping[int, tuple[nn.Module, Mapping[str, Tensor]]]) -> None:
        self._walk, self._stream, self.loaded, self.observed = walk, walk.stream, layers, False
        self.batches = walk.batches

    @property
    def layers(self) -> list[Layer]:
        """Return the layers, in order."""
        stream = self._stream
        architecture, where = stream.reader.architecture, (stream.device, stream.dtype, stream.processes)
        return [
            Layer(architecture, index, module, state, *where, self._walk.first_token)
            for index, (module, state) in self.loaded.items()
        ]

    @property
    def layer(self) -> Layer:
        """Return the only layer of a visit with ``group`` 1."""
        (layer,) = self.layers
        return layer

    @property
    def index(self) -> int:
        """Return the index of the first layer."""
        return next(iter(self.loaded))

    def observe(self, *observers: Observer) -> None:
        """Run the layers once on all batches, in place, and feed each observer the calls of its layer."""
        with self._walk.stage("observe"):
            self._run(observers)

    def read(
        self,
        plan: LayerPlan,
        gradients: GradientMoment | None,
        *beside: Observer,
        targets: Iterable[str] = (),
    ) -> Found:
        """Run the only layer and return the statistics that its solvers need, with ``gradients``.

        ``beside``: more observers. ``targets``: more targets to collect moments for. Raises UserError if activations
        are NaN or inf.
        """
        with self._walk.stage("observe"):
            needed = statistics_needed(self.layer, plan, targets)
            self._run([*needed, *beside])
            found = {statistic.name: statistic.result() for statistic in needed}
            del needed  # free the sums before gradients are loaded
            if gradients is None:
                return found
            fetched = gradients.moved(self._stream.fetch)
            return found | {GRADIENTS: fetched.by_target(self._stream.reader.family)}

    def _run(self, observers: Sequence[Observer]) -> None:
        assert not self.observed, "the batches have passed the last layer already"
        assert {observer.index for observer in observers} <= self.loaded.keys(), (
            "an observer of another layer"
        )
        self.observed = True
        for index, (module, _) in self.loaded.items():
            here = [observer for observer in observers if observer.index == index]
            self._stream.advance(module, index, self.batches, *here)
