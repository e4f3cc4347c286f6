"""Looks at a model layer by layer, as a compression goes through it: behind ``lrc inspect``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from lrc import __version__
from lrc.allocation.walk import Visit, visits
from lrc.checkpoint.reader import CheckpointReader
from lrc.errors import OutOfResources
from lrc.hub.names import resolve_model
from lrc.hub.tokenizer import load_tokenizer
from lrc.inspection.asked import Asked, base_text, checked_keeps, find_asked, known_methods
from lrc.inspection.estimate import choices, estimate, recorded, relative
from lrc.inspection.fidelity import fidelity
from lrc.inspection.output import REFIT, Output
from lrc.inspection.spectrum import conditioning, spectra
from lrc.job import default_batch, find_device, find_dtype
from lrc.measure import LayerMeasure, Measured
from lrc.methods import Method
from lrc.methods.contract import Prediction, Problem, Solution
from lrc.moments.observe import observe
from lrc.outer import pose_outer
from lrc.plan.data import DataLike
from lrc.plan.resolved import ResolvedPlan
from lrc.report.inspection import Conditioning, Estimate, Held, Inspected, Inspection, Unit
from lrc.room import choose_place, known_place
from lrc.solve import pose, read_gradients, site_of
from lrc.states import States
from lrc.stopwatch import Stopwatch
from lrc.stream import ModelStream
from lrc.synthetic import synthesize
from lrc.template import templates
from lrc.text.blocks import batched
from lrc.texts import draw_texts
from lrc.tokens import too_few

Progress = Callable[[str, int], Callable[[int], object]]

KEEPS = (0.9, 0.8, 0.6, 0.4)
SAMPLES = 32
_PACKAGES = ("torch", "transformers")


def inspect_model(
    model: str | Path,
    *,
    against: str | Path | None = None,
    keeps: Sequence[float] | None = None,
    method_names: Sequence[str] | None = None,
    layers: str | None = None,
    targets: Sequence[str] | None = None,
    tables: bool = False,
    gradients: bool = False,
    calib: DataLike | None = None,
    samples: int = SAMPLES,
    seq_len: int | None = None,
    data_dir: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    states: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], object] | None = None,
) -> Inspection:
    """Spectra, moments, what methods would lose at each of ``keeps`` and what ``auto`` would take, by layer and target.

    ``method_names`` (default: all), ``layers`` (``0-3,-1``; default: all) and ``targets`` (default: all of a layer) say
    what is looked at; ``tables`` adds the embedding and the head. ``gradients`` adds what errors cost the loss, by a
    sweep back through the model. Moments are of ``samples`` blocks of ``seq_len`` tokens of ``calib``. ``against``: the
    folder of an lrc output of the model, each of whose targets is held against the original, and run beside it on the
    same tokens. The rest is as for ``lrc.compress``. Raises UserError for what the user can mend.
    """
    keeps = checked_keeps(KEEPS if keeps is None else keeps)
    known = known_methods(method_names)
    found = resolve_model(str(model), revision=revision, allow_pickle=allow_pickle)
    reader = CheckpointReader(found.path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    asked = find_asked(reader.architecture, known, keeps, layers, targets, tables=tables, gradients=gradients)
    place, waiting = find_device(device), known_place(states)
    output = None
    if against is not None:
        folder = Path(against).expanduser()
        output = Output(folder, reader, str(model), place, trust_remote_code=trust_remote_code)
    precision = find_dtype(dtype, place, reader.dtype)
    text = base_text(reader.architecture, samples, seq_len, gradients=gradients)
    (job,) = templates(found, reader, text, "lrc inspect", [0.5])
    watch = Stopwatch(place)
    tokenizer = load_tokenizer(found.path, trust_remote_code=trust_remote_code)
    generate = partial(
        synthesize,
        job=job,
        device=place,
        dtype=precision,
        batch_size=batch_size,
        watch=watch,
        progress=progress,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    data = None if data_dir is None else Path(data_dir)
    with watch.stage("text"):
        texts = draw_texts(job, tokenizer, calib, None, None, data, generate)
    blocks = texts.calibration.blocks
    looked_at = replace(job.plan, layers=asked.plans if gradients else (), outer=())
    names = {target.name for target in (*asked.inside, *asked.outside)}
    few = too_few(reader.architecture, looked_at, len(blocks), losses=gradients, targets=names)
    warnings = [*texts.warnings, *few]
    if warn:
        for warning in warnings:
            warn(warning)
    batch = batch_size or default_batch(place.type, job.plan.seq_len)
    waits = choose_place(waiting, job, place, precision, batch, len(blocks))
    stream = ModelStream(reader, place, precision, States(waits, Path(tempfile.gettempdir())))
    with _memory_advice(batch):
        inspector = Inspector(stream, asked, keeps, known, output, job.plan, watch)
        inspector.run(blocks, batch, gradients=gradients, progress=progress)
    return Inspection(
        model=found.source,
        fingerprint=reader.fingerprint,
        layers=asked.layers,
        keeps=list(keeps),
        gradients=gradients,
        calibration=texts.fitted_to,
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        dtype=str(precision).removeprefix("torch."),
        targets=inspector.targets,
        moments=inspector.moments,
        against=None if against is None else str(against),
        seconds=watch.seconds,
        peak_bytes=watch.peak_bytes,
        warnings=warnings,
        versions={"lrc": __version__, **{name: version(name) for name in _PACKAGES}},
    )


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


@contextmanager
def _memory_advice(batch_size: int) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfResources(
            f"the GPU is out of memory; try --batch-size below {batch_size}, fewer --samples, --targets one at a "
            "time, or --device cpu"
        ) from error
