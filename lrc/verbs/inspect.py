"""What a model is made of and what methods would lose: behind ``lrc inspect``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from lrc.calibration.enough import too_few
from lrc.errors import OutOfResources
from lrc.inspection.asked import base_plan, checked_keeps, find_asked, known_methods
from lrc.inspection.inspector import Inspector
from lrc.inspection.output import Output
from lrc.plan.job import templates
from lrc.plan.library import draft_of
from lrc.records.inspection import Inspection
from lrc.run.offload import States
from lrc.run.settings import Run
from lrc.run.versions import versions
from lrc.text.spec import DataLike
from lrc.verbs.setup import set_up
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
    run: Run = Run(),
) -> Inspection:
    """Find spectra, moments, what methods would lose at each of ``keeps`` and what ``auto`` would take, by target.

    ``method_names`` (default: all), ``layers`` (``0-3,-1``; default: all) and ``targets`` (default: all of a layer) say
    what is looked at; ``tables`` adds the embedding and the head. ``gradients`` adds what errors cost the loss, by a
    sweep back through the model. Moments are of ``samples`` blocks of ``seq_len`` tokens of ``calib``. ``against``: the
    folder of an lrc output of the model, each of whose targets is held against the original, and run beside it on the
    same tokens. The rest is as for ``lrc.compress``. Raises UserError for what the user can mend.
    """
    keeps = checked_keeps(KEEPS if keeps is None else keeps)
    known = known_methods(method_names)
    setup = set_up(model, run)
    reader, architecture = setup.reader, setup.reader.architecture
    asked = find_asked(architecture, known, keeps, layers, targets, tables=tables, gradients=gradients)
    output = None
    if against is not None:
        folder, trusted = Path(against).expanduser(), run.trust_remote_code
        output = Output(folder, reader, str(model), setup.device, trust_remote_code=trusted)
    plan = base_plan(architecture, samples, seq_len, gradients=gradients)
    (job,) = templates(setup.model, reader, draft_of(plan, "lrc inspect"), [0.5])
    with setup.watch.stage("text"):
        texts = setup.texts(job, calib)
    blocks, batch = texts.calibration.blocks, setup.batch_size(job)
    looked_at = replace(job.plan, layers=asked.plans if gradients else (), outer=())
    names = {target.name for target in (*asked.inside, *asked.outside)}
    few = too_few(architecture, looked_at, len(blocks), losses=gradients, targets=names)
    warnings = [*texts.warnings, *few]
    setup.warn(warnings)
    states = States(setup.offload(job, len(blocks)), Path(tempfile.gettempdir()))
    stream = ModelStream(reader, setup.device, setup.dtype, states)
    with _memory_advice(batch):
        inspector = Inspector(stream, asked, keeps, known, output, job.plan, setup.watch)
        inspector.run(blocks, batch, gradients=gradients, progress=run.progress)
    return Inspection(
        model=setup.model.source,
        fingerprint=reader.fingerprint,
        layers=asked.layers,
        keeps=list(keeps),
        gradients=gradients,
        calibration=texts.fitted_to,
        device=setup.device_name,
        dtype=setup.dtype_name,
        targets=inspector.targets,
        moments=inspector.moments,
        against=None if against is None else str(against),
        seconds=setup.watch.seconds,
        peak_bytes=setup.watch.peak_bytes,
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
