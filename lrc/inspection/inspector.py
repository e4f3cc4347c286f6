"""Looks at a model layer by layer, as a compression goes through it: behind ``lrc inspect``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from lrc.compression.measure import LayerMeasure, Measured
from lrc.compression.solve import pose
from lrc.compression.tables import pose_outer
from lrc.inspection.asked import Asked
from lrc.inspection.estimate import choices, estimate, recorded, relative
from lrc.inspection.fidelity import fidelity
from lrc.inspection.output import REFIT, Output
from lrc.inspection.spectrum import conditioning, spectra
from lrc.methods import Method
from lrc.methods.contract import Prediction, Problem, Solution
from lrc.moments.gradient import GradientMoment
from lrc.moments.moment import Moment, Moments, site_of
from lrc.moments.statistic import Layer
from lrc.plan.resolved import LayerPlan, ResolvedPlan
from lrc.records.inspection import Conditioning, Estimate, Held, Inspected, Unit
from lrc.run.stopwatch import Stopwatch
from lrc.text.blocks import batched
from lrc.walk.backward import read_gradients
from lrc.walk.stream import ModelStream
from lrc.walk.walk import Visit, Walk

Progress = Callable[[str, int], Callable[[int], object]]


class Inspector:
    """Goes through a model once; ``targets`` and ``moments`` are what it found so far.

    The device holds one layer with its moments, and what the largest solve takes. Moments and gradients are taken as
    ``plan`` says; its layers are not looked at.
    """

    def __init__(
        self,
        stream: ModelStream,
        asked: Asked,
        keeps: Sequence[float],
        known: Mapping[str, Method],
        output: Output | None,
        plan: ResolvedPlan,
        watch: Stopwatch,
    ) -> None:
        self._stream, self._asked, self._keeps, self._known = stream, asked, keeps, known
        self._output, self._watch, self._architecture = output, watch, stream.reader.architecture
        self._plan = plan
        self.targets: list[Inspected] = []
        self.moments: list[Conditioning] = []

    def run(
        self, blocks: torch.Tensor, batch_size: int, *, gradients: bool, progress: Progress | None
    ) -> None:
        """Look at everything asked for, from token blocks (n, tokens)."""
        asked, stream = self._asked, self._stream
        advance = progress("inspect", len(asked.layers) + bool(asked.outside)) if progress else lambda _: None
        plans = {plan.index: plan for plan in asked.plans}
        swept: dict[int, GradientMoment] = {}
        if gradients:
            with self._watch.stage("gradients"):
                swept = read_gradients(
                    stream, plans.values(), self._plan.plan.calibration, blocks, batch_size, losses=True
                )
        with self._watch.stage("embed"):
            batches = stream.embed(batched(blocks, batch_size))
        end = self._architecture.layers if asked.outside else max(asked.layers, default=-1) + 1
        for visit in Walk(stream, batches, end=end, first_token=self._plan.first_token, watch=self._watch):
            if (plan := plans.get(visit.index)) is not None:
                self._layer(visit, plan, swept.pop(visit.index, None))
                advance(1)
        if asked.outside:
            with self._watch.stage("observe"):
                names = [target.name for target in asked.outside]
                problems = pose_outer(stream, names, blocks, batches)
            held = self._held_outside(problems)
            self._look(None, problems, held)
            advance(1)

    def _layer(self, visit: Visit, plan: LayerPlan, gradients: GradientMoment | None) -> None:
        names, layer = [target.name for target in self._asked.inside], visit.layer
        with self._against():
            solutions = self._stored(layer, names)
            measures = [LayerMeasure(self._stream, layer, solutions)] if solutions else []
        found = visit.read(plan, gradients, *measures, targets=names)
        measured = {name: each for measure in measures for name, each in measure.result().items()}
        del measures  # with the reduced layers
        with self._watch.stage("spectra"):
            self._condition(layer.index, found[Moments.name])
        problems = {name: pose(self._architecture, name, layer.state, found) for name in names}
        with self._against():
            held = {
                name: self._compared(layer.index, problems[name], name, solution, measured[name])
                for name, solution in solutions.items()
            }
        self._look(layer.index, problems, held)

    def _condition(self, layer: int, moments: Mapping[str, Moment]) -> None:
        """Record the moments by target of a layer, as methods take them: centred beside a bias."""
        family = self._architecture.family
        roles = {role for target in self._asked.inside for role in target.matrices}
        at = {site_of(family, target): moment for target, moment in moments.items()}
        seen = set[tuple[str, bool]]()
        for role, matrix in self._architecture.matrices.items():
            key = family.site(role), matrix.bias
            if role in roles and key[0] in at and key not in seen:
                seen.add(key)
                self.moments.append(conditioning(layer, key[0], at[key[0]], centred=key[1]))

    def _look(self, layer: int | None, problems: Mapping[str, Problem], held: Mapping[str, Held]) -> None:
        """Spectra, estimates and choices of problems by target."""
        estimates: dict[str, list[Estimate]] = {}
        with self._watch.stage("solve"):
            for name, problem in problems.items():
                estimates[name] = [estimate(problem, one) for one in self._asked.candidates[name]]
        chosen = choices(self._architecture, self._keeps, estimates, self._known)
        with self._watch.stage("spectra"):
            for name, problem in problems.items():
                plain, whitened = spectra(problem)
                self.targets.append(
                    Inspected(layer, name, plain, whitened, estimates[name], chosen[name], held.get(name))
                )

    def _against(self) -> AbstractContextManager[object]:
        return self._watch.stage("against") if self._output else nullcontext()

    def _stored(self, layer: Layer, names: Collection[str]) -> dict[str, Solution]:
        """Return what the output stores in the place of a layer's targets, by target; nothing without an output."""
        if self._output is None:
            return {}
        stored = self._output.layer(layer.index, layer.state)
        return {name: solution for name, solution in stored.items() if name in names}

    def _held_outside(self, problems: Mapping[str, Problem]) -> dict[str, Held]:
        if self._output is None:
            return {}
        found = {}
        with self._watch.stage("against"):
            for name, problem in problems.items():
                if (part := self._output.outer(name)) is not None:
                    solution = Solution({name: part}, Prediction(0.0, 0.0, "output"))
                    found[name] = self._compared(None, problem, name, solution, Measured())
        return found

    def _compared(
        self, layer: int | None, problem: Problem, target: str, solution: Solution, measured: Measured
    ) -> Held:
        assert self._output is not None
        near, record = fidelity(problem, solution), self._output.record(layer, target)
        targets = self._architecture.targets | self._architecture.outer
        whole = targets[target].parameters
        size, kept, method = None, whole, REFIT
        told: tuple[float | None, float | None, Unit | None] = (None, None, None)
        if record is not None:
            size, kept, method = record["size"], record["kept"], record["method"]
            told = recorded(record)
        return Held(
            method=method,
            size=size,
            kept=kept,
            whole=whole,
            reconstruction=near.reconstruction,
            data_error=near.data_error,
            overlap=near.overlap,
            angle=near.angle,
            measured=relative(measured.error, measured.reference),
            kl=measured.kl,
            recorded_predicted=told[0],
            recorded_measured=told[1],
            recorded_unit=told[2],
        )
