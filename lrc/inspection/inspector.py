"""Looks at a model layer by layer, as a compression goes through it: behind ``lrc inspect``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from lrc.allocation.stops import Visit, visits
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
from lrc.moments.observe import observe
from lrc.plan.resolved import ResolvedPlan
from lrc.records.inspection import Conditioning, Estimate, Held, Inspected, Unit
from lrc.run.stopwatch import Stopwatch
from lrc.text.blocks import batched
from lrc.walk.needs import site_of
from lrc.walk.stream import ModelStream
from lrc.walk.walk import read_gradients

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
        sites = {site_of(self._architecture, target.name) for target in asked.inside}
        swept = {}
        if gradients:
            with self._watch.stage("gradients"):
                swept = read_gradients(
                    stream, plans.values(), self._plan.plan.calibration, blocks, batch_size, losses=True
                )
        with self._watch.stage("embed"):
            batches = stream.embed(batched(blocks, batch_size))
        end = self._architecture.layers if asked.outside else max(asked.layers, default=-1) + 1
        walk = visits(stream, plans, batches, swept, end, self._plan.first_token, sites)
        while True:
            with self._watch.stage("observe"):
                visit = next(walk, None)
            if visit is None:
                break
            self._layer(visit)
            del visit  # with its moments, before the next layer's are summed
            advance(1)
        if asked.outside:
            with self._watch.stage("observe"):
                names = [target.name for target in asked.outside]
                problems = pose_outer(stream, names, blocks, batches)
            held = self._held_outside(problems)
            self._look(None, problems, held)
            advance(1)

    def _layer(self, visit: Visit) -> None:
        names = [target.name for target in self._asked.inside]
        roles = {r for t in self._asked.inside for r in t.matrices}

        def posed(target: str) -> Problem:
            return pose(self._architecture, target, visit.state, visit.statistics)

        with self._watch.stage("spectra"):
            self._condition(visit, roles)
        held = self._held(visit, posed)
        problems = {name: posed(name) for name in names}
        self._look(visit.index, problems, held)

    def _condition(self, visit: Visit, roles: Collection[str]) -> None:
        """The moments that the targets of a layer read, as methods take them: centred beside a bias."""
        family = self._architecture.family
        seen = set[tuple[str, bool]]()
        for role, matrix in self._architecture.matrices.items():
            key = family.site(role), matrix.bias
            if role in roles and key[0] in visit.statistics.moments and key not in seen:
                seen.add(key)
                moment = visit.statistics.moments[key[0]]
                self.moments.append(conditioning(visit.index, key[0], moment, centred=key[1]))

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

    def _held(self, visit: Visit, posed: Callable[[str], Problem]) -> dict[str, Held]:
        """What of a layer an output stores, by target, beside the original, run on all blocks."""
        if self._output is None:
            return {}
        with self._watch.stage("against"):
            solutions = self._output.layer(visit.index, visit.state)
            names = {target.name for target in self._asked.inside}
            solutions = {name: solution for name, solution in solutions.items() if name in names}
            measure = LayerMeasure(self._stream, visit.index, visit.state, solutions, self._plan.first_token)
            for batch in visit.batches if solutions else ():
                with observe(visit.layer, measure.watched) as calls:
                    self._stream.run(visit.layer, visit.index, batch, batch.hidden)
                measure.add(calls)
            measured = measure.results()
            return {
                name: self._compared(visit.index, posed(name), name, solution, measured[name])
                for name, solution in solutions.items()
            }

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
