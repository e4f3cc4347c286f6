"""Looks at a model layer by layer, as a compression goes through it: behind ``lrc inspect``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lrc import __version__
from lrc.allocation.walk import Visit, visits
from lrc.checkpoint.reader import CheckpointReader
from lrc.errors import OutOfResources, UserError, nearest
from lrc.families import Architecture, Target
from lrc.hub.names import resolve_model
from lrc.hub.tokenizer import load_tokenizer
from lrc.inspection.auto import choose, choose_component
from lrc.inspection.candidates import TABLE_COLLECTORS, Candidate, candidates
from lrc.inspection.fidelity import fidelity
from lrc.inspection.output import REFIT, Output
from lrc.inspection.spectrum import conditioning, spectra
from lrc.job import Job, default_batch, find_device, find_dtype
from lrc.measure import LayerMeasure, Measured
from lrc.methods import Method, methods
from lrc.methods.contract import Affine, Factors, Prediction, Problem, Solution
from lrc.modules import kinds
from lrc.modules.embedding import EMBEDDING
from lrc.moments import COLLECTORS
from lrc.moments.observe import observe
from lrc.outer import pose_outer
from lrc.plan.data import DataLike
from lrc.plan.resolved import LayerPlan
from lrc.plan.schema import matched_layers
from lrc.report.inspection import Choice, Conditioning, Estimate, Held, Inspected, Inspection, Unit
from lrc.room import choose_place, known_place
from lrc.solve import pose, read_gradients, site_of, solve
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
_COMPONENTS = ("qk", "ov", "mlp")
_PACKAGES = ("torch", "transformers")


@dataclass(frozen=True)
class Asked:
    """What to look at: layers, targets of them and outside of them, and what each method could do to a target."""

    layers: list[int]
    inside: list[Target]
    outside: list[Target]
    candidates: Mapping[str, list[Candidate]]


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
    keeps = _checked_keeps(KEEPS if keeps is None else keeps)
    known = _known_methods(method_names)
    found = resolve_model(str(model), revision=revision, allow_pickle=allow_pickle)
    reader = CheckpointReader(found.path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    asked = _asked(reader.architecture, known, keeps, layers, targets, tables=tables, gradients=gradients)
    place, waiting = find_device(device), known_place(states)
    output = None
    if against is not None:
        output = Output(Path(against).expanduser(), reader, place, trust_remote_code=trust_remote_code)
    precision = find_dtype(dtype, place, reader.dtype)
    text = _base(reader.architecture, samples, seq_len, gradients=gradients)
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
    folder = None if data_dir is None else Path(data_dir)
    with watch.stage("text"):
        texts = draw_texts(job, tokenizer, calib, None, None, folder, generate)
    blocks = texts.calibration.blocks
    warnings = [*texts.warnings, *too_few(reader.architecture, job.plan, len(blocks), losses=gradients)]
    if warn:
        for warning in warnings:
            warn(warning)
    batch = batch_size or default_batch(place.type, job.plan.seq_len)
    waits = choose_place(waiting, job, place, precision, batch, len(blocks))
    stream = ModelStream(reader, place, precision, States(waits, Path(tempfile.gettempdir())))
    with _memory_advice(batch):
        inspector = Inspector(stream, asked, keeps, known, output, watch)
        inspector.run(blocks, job, batch, gradients=gradients, progress=progress)
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

    The device holds one layer with its moments, and what the largest solve takes.
    """

    def __init__(
        self,
        stream: ModelStream,
        asked: Asked,
        keeps: Sequence[float],
        known: Mapping[str, Method],
        output: Output | None,
        watch: Stopwatch,
    ) -> None:
        self._stream, self._asked, self._keeps, self._known = stream, asked, keeps, known
        self._output, self._watch, self._architecture = output, watch, stream.reader.architecture
        self.targets: list[Inspected] = []
        self.moments: list[Conditioning] = []

    def run(
        self, blocks: torch.Tensor, job: Job, batch_size: int, *, gradients: bool, progress: Progress | None
    ) -> None:
        """Look at everything asked for, from token blocks (n, tokens)."""
        asked, stream = self._asked, self._stream
        advance = progress("inspect", len(asked.layers) + bool(asked.outside)) if progress else lambda _: None
        chosen = tuple(one.assignment for t in asked.inside for one in asked.candidates[t.name])
        plans = {index: LayerPlan(index, chosen) for index in asked.layers}
        sites = {site_of(self._architecture, target.name) for target in asked.inside}
        swept = {}
        if gradients:
            with self._watch.stage("gradients"):
                swept = read_gradients(
                    stream, plans.values(), job.plan.plan.calibration, blocks, batch_size, losses=True
                )
        with self._watch.stage("embed"):
            batches = stream.embed(batched(blocks, batch_size))
        end = self._architecture.layers if asked.outside else max(asked.layers, default=-1) + 1
        walk = visits(stream, plans, batches, swept, end, sites)
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
                estimates[name] = [_estimate(problem, one) for one in self._asked.candidates[name]]
        choices = _choices(self._architecture, self._keeps, estimates, self._known)
        with self._watch.stage("spectra"):
            for name, problem in problems.items():
                plain, whitened = spectra(problem)
                self.targets.append(
                    Inspected(layer, name, plain, whitened, estimates[name], choices[name], held.get(name))
                )

    def _held(self, visit: Visit, posed: Callable[[str], Problem]) -> dict[str, Held]:
        """What of a layer an output stores, by target, beside the original, run on all blocks."""
        if self._output is None:
            return {}
        with self._watch.stage("against"):
            solutions = self._output.layer(visit.index, visit.state)
            names = {target.name for target in self._asked.inside}
            solutions = {name: solution for name, solution in solutions.items() if name in names}
            measure = LayerMeasure(self._stream, visit.index, visit.state, solutions)
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


def recorded(record: Mapping[str, Any]) -> tuple[float, float | None, Unit]:
    """What a manifest's record of a target predicted and measured, and in what unit that is predicted.

    Measured is the divergence in nats where that is what was, else the relative error.
    """
    error, unit = figure(Prediction(**record["predicted"]))
    measured = record["measured"]
    if measured["kl"] is not None:
        return error, measured["kl"], unit
    return error, relative(measured["error"], measured["reference"]), unit


def figure(prediction: Prediction) -> tuple[float, Unit]:
    """The one number by which a prediction is told, and what it is."""
    if prediction.metric == "kl":
        return prediction.error, "nats KL"
    if prediction.metric == "loss":
        return prediction.error, "nats of loss"
    return (
        prediction.relative,
        "relative error of scores" if prediction.metric == "scores" else "relative error",
    )


def relative(error: float | None, reference: float | None) -> float | None:
    """(error / reference)^½; None where either is."""
    if error is None or reference is None:
        return None
    return (error / reference) ** 0.5 if reference > 0 else 0.0


def _estimate(problem: Problem, candidate: Candidate) -> Estimate:
    one = candidate.assignment
    solution = solve(problem, one)
    error, unit = figure(solution.predicted)
    steps = sum(_steps(part) for part in solution.parts.values())
    return Estimate(
        keep=candidate.keep,
        method=one.method,
        options=dict(one.options),
        size=one.size,
        kept=one.kept,
        whole=one.whole,
        error=error,
        unit=unit,
        loss=solution.predicted.loss,
        steps=steps,
    )


def _steps(part: Affine | Factors) -> int:
    """What a token goes through: one product with a matrix, one look-up and a product with an embedding."""
    if isinstance(part, Affine):
        return 1
    return 2 if part.kind == EMBEDDING else kinds()[part.kind].steps


def _choices(
    architecture: Architecture,
    keeps: Sequence[float],
    estimates: Mapping[str, Sequence[Estimate]],
    known: Mapping[str, Method],
) -> dict[str, list[Choice]]:
    """What ``auto`` takes of each target at each kept fraction, of components with their projections in view."""
    found: dict[str, list[Choice]] = {name: [] for name in estimates}
    for keep in keeps:
        alone = {
            name: choice
            for name, each in estimates.items()
            if (choice := choose(name, keep, each, known)) is not None
        }
        for name, choice in alone.items():
            if name in _COMPONENTS:
                roles = architecture.family.component(name)
                if all(role in alone for role in roles):
                    parts = {role: alone[role] for role in roles}
                    choice = choose_component(architecture, name, choice, parts, known)
            found[name].append(choice)
    return found


def _asked(
    architecture: Architecture,
    known: Mapping[str, Method],
    keeps: Sequence[float],
    layers: str | None,
    names: Sequence[str] | None,
    *,
    tables: bool,
    gradients: bool,
) -> Asked:
    """What there is to look at; UserError for a layer or target that the model does not have."""
    chosen = set(range(architecture.layers))
    if layers is not None:
        try:
            chosen = matched_layers(layers, architecture.layers)
        except ValueError as error:
            raise UserError(f"--layers {layers}: {error}") from None
    there = architecture.targets | architecture.outer
    for name in names or ():
        if name == "lm_head" and architecture.tied:
            raise UserError(
                "--targets lm_head: the head of this model is its embedding; name embed, which is both"
            )
        if name not in there:
            raise UserError(
                f"--targets {name}: {architecture.family.model_type} has no target {name!r}; "
                f"{nearest(name, there)}"
            )
    inside = [t for name, t in architecture.targets.items() if names is None or name in names]
    outside = [t for name, t in architecture.outer.items() if (tables if names is None else name in names)]
    collectors = COLLECTORS if gradients else COLLECTORS - {"gradients"}
    return Asked(
        sorted(chosen) if inside else [],
        inside,
        outside,
        candidates(architecture, inside, known, keeps, collectors)
        | candidates(architecture, outside, known, keeps, TABLE_COLLECTORS),
    )


def _checked_keeps(keeps: Iterable[float]) -> tuple[float, ...]:
    found = tuple(keeps)
    if not found or any(not 0 < keep < 1 for keep in found) or len(set(found)) < len(found):
        listed = ",".join(f"{keep:g}" for keep in found)
        raise UserError(f"--keeps {listed}: fractions to estimate are distinct, above 0 and below 1")
    return tuple(sorted(found, reverse=True))


def _known_methods(names: Sequence[str] | None) -> dict[str, Method]:
    known = methods()
    if names is None:
        return known
    for name in names:
        if name not in known:
            raise UserError(f"--methods {name}: there is no such method; {nearest(name, known)}")
    return {name: method for name, method in known.items() if name in names}


def _base(architecture: Architecture, samples: int, seq_len: int | None, *, gradients: bool) -> str:
    """A plan that reads all sites, and gradients of all projections where they are asked for."""
    if seq_len is not None and not 2 <= seq_len <= architecture.positions:
        raise UserError(
            f"--seq-len {seq_len}: the model reads 2 to {architecture.positions} tokens at once; the nearest is "
            f"{min(max(seq_len, 2), architecture.positions)}"
        )
    length = "" if seq_len is None else f", seq_len: {seq_len}"
    method = "two_sided_svd" if gradients else "whitened_svd"
    return (
        f"format: 1\nmethod: {method}\n"
        f"calibration: {{samples: {samples}, gradient_samples: {samples}{length}}}\n"
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
