"""Inspect a model layer by layer: what ``lrc inspect`` runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from torch import Tensor

from lrc.compression.embedding import make_outer_problems
from lrc.compression.measure import LayerMeasure, Measured
from lrc.compression.solve import make_problem
from lrc.inspection.best import choices
from lrc.inspection.candidates import Selection, figure
from lrc.inspection.output import Output, fidelity
from lrc.inspection.spectrum import conditioning, spectra
from lrc.methods.contract import Prediction, Problem, Solution
from lrc.moments.gradient import GradientMoment
from lrc.moments.moment import Moment, Moments, site_of
from lrc.plan.resolved import LayerPlan, ResolvedPlan
from lrc.records.inspection import Conditioning, Inspected, OutputErrors
from lrc.run.settings import Progress
from lrc.run.stopwatch import Stopwatch
from lrc.text.blocks import batched
from lrc.walk.backward import read_gradients
from lrc.walk.stream import ModelStream
from lrc.walk.walk import Visit, Walk


@dataclass
class Inspector:
    """One walk through a model; ``targets`` and ``moments`` hold the results so far.

    The device holds one layer with its moments and the largest solve. ``plan`` says how moments and gradients are
    taken; its layers are ignored.
    """

    stream: ModelStream
    selection: Selection
    output: Output | None
    plan: ResolvedPlan
    watch: Stopwatch
    targets: list[Inspected] = field(default_factory=list)
    moments: list[Conditioning] = field(default_factory=list)

    def run(self, blocks: Tensor, batch_size: int, *, gradients: bool, stage: Progress) -> None:
        """Inspect everything selected, on token blocks (n, tokens); ``stage`` starts the progress."""
        selected, stream = self.selection, self.stream
        advance = stage("inspect", len(selected.layers) + bool(selected.outside))
        plans = {plan.index: plan for plan in selected.plans}
        swept: dict[int, GradientMoment] = {}
        if gradients:
            with self.watch.stage("gradients"):
                swept = read_gradients(
                    stream,
                    plans.values(),
                    self.plan.plan.calibration,
                    blocks,
                    batch_size,
                    losses=True,
                    start=stage,
                )
        with self.watch.stage("embed"):
            batches = stream.embed(batched(blocks, batch_size))
        end = selected.architecture.layers if selected.outside else max(selected.layers, default=-1) + 1
        for visit in Walk(stream, batches, end=end, first_token=self.plan.first_token, watch=self.watch):
            if (plan := plans.get(visit.index)) is not None:
                self._layer(visit, plan, swept.pop(visit.index, None))
                advance(1)
        if selected.outside:
            names, solutions = [target.name for target in selected.outside], {}
            with self.watch.stage("observe"):
                problems = make_outer_problems(stream, names, blocks, batches)
            if self.output:
                with self.watch.stage("against"):
                    stored = {name: self.output.outer(name) for name in names}
                solutions = {name: solution for name, solution in stored.items() if solution}
            self._record(None, problems, solutions, {})
            advance(1)

    def _layer(self, visit: Visit, plan: LayerPlan, gradients: GradientMoment | None) -> None:
        names, layer = [target.name for target in self.selection.inside], visit.layer
        solutions, observers = dict[str, Solution](), list[LayerMeasure]()
        if self.output:
            with self.watch.stage("against"):
                stored = self.output.layer(layer.index, layer.state)
                solutions = {name: solution for name, solution in stored.items() if name in names}
                observers = [LayerMeasure(self.stream, layer, solutions)] if solutions else []
        found = visit.read(plan, gradients, *observers, targets=names)
        measured = observers.pop().result() if observers else {}  # and frees the reduced layers
        with self.watch.stage("spectra"):
            self._condition(layer.index, found[Moments.name])
        problems = {
            name: make_problem(self.selection.architecture, name, layer.state, found) for name in names
        }
        self._record(layer.index, problems, solutions, measured)

    def _condition(self, layer: int, moments: Mapping[str, Moment]) -> None:
        """Record the conditioning of a layer's moments by target, centred where the projection has a bias."""
        family = self.selection.architecture.family
        roles = {role for target in self.selection.inside for role in target.matrices}
        at = {site_of(family, target): moment for target, moment in moments.items()}
        read = dict.fromkeys(
            (family.site(role), matrix.bias)
            for role, matrix in self.selection.architecture.matrices.items()
            if role in roles
        )
        self.moments += [
            conditioning(layer, site, at[site], centred=bias) for site, bias in read if site in at
        ]

    def _record(
        self,
        layer: int | None,
        problems: Mapping[str, Problem],
        solutions: Mapping[str, Solution],
        measured: Mapping[str, Measured],
    ) -> None:
        """Record spectra, estimates and choices of problems by target, and how close the output's solutions are."""
        compared, selected = dict[str, OutputErrors](), self.selection
        if solutions:
            with self.watch.stage("against"):
                compared = {
                    name: self._compare(layer, name, problems[name], solution, measured.get(name, Measured()))
                    for name, solution in solutions.items()
                }
        with self.watch.stage("solve"):
            estimates = {
                name: [one.estimate(problem) for one in selected.candidates[name]]
                for name, problem in problems.items()
            }
        chosen = choices(selected.architecture, selected.keeps, estimates, selected.methods)
        with self.watch.stage("spectra"):
            for name, problem in problems.items():
                plain, whitened = spectra(problem)
                self.targets.append(
                    Inspected(layer, name, plain, whitened, estimates[name], chosen[name], compared.get(name))
                )

    def _compare(
        self, layer: int | None, target: str, problem: Problem, solution: Solution, measured: Measured
    ) -> OutputErrors:
        """Compare what the output stores for a target with the original."""
        assert self.output is not None
        record = self.output.records.get((layer, target))
        error, unit = figure(record.predicted) if record else (None, None)
        recorded = record.measured if record else Measured()
        whole = (self.selection.architecture.targets | self.selection.architecture.outer)[target].parameters
        return OutputErrors(
            method=record.method if record else "refit",
            size=record.size if record else None,
            kept=record.kept if record else whole,
            whole=whole,
            **asdict(fidelity(problem, solution)),
            measured=_relative(measured),
            kl=measured.kl,
            recorded_predicted=error,
            recorded_measured=_relative(recorded) if recorded.kl is None else recorded.kl,
            recorded_unit=unit,
        )


def _relative(measured: Measured) -> float | None:
    """Return (E‖Δy‖² / E‖y‖²)^½; None where it was not measured."""
    if measured.error is None or measured.reference is None:
        return None
    return Prediction(measured.error, measured.reference, "output").relative
