"""What a model is made of and what methods would lose: behind ``lrc inspect``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from lrc.calibration.draw import draw_texts
from lrc.calibration.enough import too_few
from lrc.calibration.synthetic import synthesize
from lrc.checkpoint.reader import CheckpointReader
from lrc.errors import OutOfResources
from lrc.estimate.room import choose_place, known_place
from lrc.hub.names import resolve_model
from lrc.hub.tokenizer import load_tokenizer
from lrc.inspection.asked import base_text, checked_keeps, find_asked, known_methods
from lrc.inspection.inspector import Inspector, Progress
from lrc.inspection.output import Output
from lrc.plan.template import templates
from lrc.records.inspection import Inspection
from lrc.run.offload import States
from lrc.run.settings import default_batch, find_device, find_dtype
from lrc.run.stopwatch import Stopwatch
from lrc.run.versions import versions
from lrc.text.spec import DataLike
from lrc.walk.stream import ModelStream

KEEPS = (0.9, 0.8, 0.6, 0.4)


SAMPLES = 32


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
        versions=versions("torch", "transformers"),
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
