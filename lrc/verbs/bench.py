"""Benchmark a model, alone or against another: what ``lrc bench`` calls."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from lrc.benchmark.cases import make_cases
from lrc.benchmark.measure import measure, weigh
from lrc.benchmark.needs import CONVERT, fit_together, needs_of
from lrc.checkpoint.headers import read_headers
from lrc.errors import UserError
from lrc.hub.loader import load
from lrc.hub.names import resolve_model
from lrc.hub.quantizer import METHOD
from lrc.modules.fused.fuse import fuse as merge
from lrc.records.benchmark import Bench, Model, Row
from lrc.run.settings import Run, find_device, find_dtype
from lrc.run.versions import versions


def bench(
    model: str | Path,
    against: str | Path | None = None,
    *,
    prefill: Sequence[tuple[int, int]] | None = None,
    decode: Sequence[tuple[int, int]] | None = None,
    modes: Sequence[str] | None = None,
    new_tokens: int = 16,
    repeats: int = 10,
    fuse: bool = True,
    run: Run = Run(),
) -> Bench:
    """Measure the speed and memory of a model, and of ``against`` in alternation if both fit on the device.

    ``prefill`` and ``decode``: pairs of batch and length. ``modes``: some of ``lrc.benchmark.cases.MODES``. A decode
    sample generates ``new_tokens``. ``fuse`` merges products of a compressed model (``lrc.fuse``); an original runs as
    in transformers. Raises UserError for a model that is missing, cannot run, or does not fit on the device.
    """
    place = find_device(run.device)
    names = [str(name) for name in (model, against) if name is not None]
    folders = [
        resolve_model(name, revision=revision, remedy=CONVERT).path
        for name, revision in zip(names, (run.revision, None), strict=False)
    ]
    for name, number in (("--new-tokens", new_tokens), ("--repeats", repeats)):
        if number < 1:
            raise UserError(f"{name} {number}: the smallest is 1")
    tensors = read_headers(sorted(folders[0].glob("*.safetensors"))).values()
    stored = next((tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point), torch.float32)
    precision = find_dtype(run.dtype, place, stored)
    sides = [
        needs_of(name, folder, precision, place, trusted=run.trust_remote_code)
        for name, folder in zip(names, folders, strict=True)
    ]
    positions = min(side.positions for side in sides)
    cases = make_cases(prefill, decode, modes, positions, new_tokens, place)
    together = fit_together(sides, cases, place)
    track = run.stage("bench", len(cases) * len(sides))
    groups = [folders] if together else [[folder] for folder in folders]
    models, rows = [], [[] for _ in cases]
    for group in groups:
        loaded = [
            load(folder, device=place, dtype=precision, trust_remote_code=run.trust_remote_code)
            for folder in group
        ]
        for one in loaded:
            table = getattr(one.config, "quantization_config", None)
            compressed = isinstance(table, dict) and table.get("quant_method") == METHOD
            merged = merge(one) if fuse and compressed else 0
            models.append(Model(names[len(models)], weigh(one).bytes, merged))
        advance = partial(track, len(group))
        found = measure(loaded, cases, new_tokens=new_tokens, repeats=repeats, advance=advance)
        rows = [[*row, *more] for row, more in zip(rows, found, strict=True)]
        del loaded, one
        gc.collect()
        if place.type == "cuda":
            torch.cuda.empty_cache()
    return Bench(
        of=models[0],
        against=models[1] if models[1:] else None,
        rows=[Row(case, *row) for case, row in zip(cases, rows, strict=True)],
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        dtype=str(precision).removeprefix("torch."),
        new_tokens=new_tokens,
        interleaved=together,
        versions=versions("torch", "transformers"),
    )
