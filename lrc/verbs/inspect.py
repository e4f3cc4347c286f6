"""Inspect a model: what ``lrc inspect`` calls."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lrc.allocation.sizing import check_keeps
from lrc.calibration.draw import too_few
from lrc.estimate.room import memory_advice
from lrc.inspection.candidates import base_plan, select
from lrc.inspection.inspector import Inspector
from lrc.inspection.output import Output
from lrc.plan.job import jobs_at_keeps
from lrc.plan.library import draft_of
from lrc.records.inspection import Inspection
from lrc.run.offload import States
from lrc.run.settings import Run
from lrc.run.versions import versions
from lrc.text.mixture import DataLike
from lrc.verbs.setup import set_up
from lrc.walk.stream import ModelStream

KEEPS = (0.9, 0.8, 0.6, 0.4)


def inspect_model(
    model: str | Path,
    *,
    against: str | Path | None = None,
    keeps: Sequence[float] | None = None,
    methods: Sequence[str] | None = None,
    layers: str | None = None,
    targets: Sequence[str] | None = None,
    tables: bool = False,
    gradients: bool = False,
    calib: DataLike | None = None,
    samples: int = 32,
    seq_len: int | None = None,
    run: Run = Run(),
) -> Inspection:
    """Return each target's spectra, moments, the errors that methods predict at ``keeps``, and the best method.

    ``methods`` (default: all), ``layers`` (such as ``0-3,-1``; default: all) and ``targets`` (default: all of a
    layer) select what is inspected; ``tables`` adds the embedding and the head. ``gradients`` adds predicted losses, by
    one backward sweep through the model. Moments are of ``samples`` blocks of ``seq_len`` tokens of ``calib``.
    ``against``: the folder of an lrc output of the model, to compare with the original on the same tokens. Raises
    UserError for every mistake that the user can fix.
    """
    keeps = check_keeps(KEEPS if keeps is None else keeps)[::-1]
    setup = set_up(model, run)
    reader, architecture = setup.reader, setup.reader.architecture
    chosen = (layers, targets, methods)
    selected = select(architecture, keeps, *chosen, tables=tables, gradients=gradients)
    output = None
    if against is not None:
        folder, trusted = Path(against).expanduser(), run.trust_remote_code
        output = Output(folder, reader, str(model), setup.device, trust_remote_code=trusted)
    plan = base_plan(architecture, samples, seq_len, gradients=gradients)
    (job,) = jobs_at_keeps(setup.model, reader, draft_of(plan, "lrc inspect"), [0.5], calib)
    with setup.watch.stage("text"):
        texts = setup.texts(job)
    blocks, batch = texts.calibration.blocks, setup.batch_size(job)
    looked_at = replace(job.plan, layers=selected.plans if gradients else (), outer=())
    names = {target.name for target in (*selected.inside, *selected.outside)}
    few = too_few(architecture, looked_at, len(blocks), losses=gradients, targets=names)
    warnings = [*reader.warnings, *texts.warnings, *few]
    setup.warn(warnings)
    states = States(setup.offload(job, len(blocks)), Path(tempfile.gettempdir()))
    stream = ModelStream(reader, setup.device, setup.dtype, states)
    advice = f"--batch-size below {batch}, fewer --samples, --targets one at a time, or --device cpu"
    with memory_advice(advice):
        inspector = Inspector(stream, selected, output, job.plan, setup.watch)
        inspector.run(blocks, batch, gradients=gradients, stage=run.stage)
    return Inspection(
        model=setup.model.source,
        fingerprint=reader.fingerprint,
        layers=selected.layers,
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
