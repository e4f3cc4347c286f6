"""Benchmark a model, alone or against another: what ``lrc bench`` calls."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lrc.benchmark.cases import make_cases
from lrc.benchmark.measure import measure, weigh
from lrc.benchmark.needs import CONVERT, fit_together, needs_of
from lrc.checkpoint.headers import read_headers
from lrc.errors import UserError
from lrc.hub.loader import load
from lrc.hub.names import resolve_model
from lrc.modules.fused.fuse import fuse as merge
from lrc.records.benchmark import Bench, Model, Row
from lrc.run.settings import Run, find_device, find_dtype
from lrc.run.versions import versions

NEW_TOKENS, REPEATS = 16, 10


def bench(
    model: str | Path,
    against: str | Path | None = None,
    *,
    prefill: Sequence[tuple[int, int]] | None = None,
    decode: Sequence[tuple[int, int]] | None = None,
    modes: Sequence[str] | None = None,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    fuse: bool = True,
    run: Run = Run(),
) -> Bench:
    """Measure the speed and memory of a model, and of another by turns if both fit on the device.

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
    precision = find_dtype(run.dtype, place, _stored(folders[0]))
    sides = [
        needs_of(name, folder, precision, place, trusted=run.trust_remote_code)
        for name, folder in zip(names, folders, strict=True)
    ]
    positions = min(side.positions for side in sides)
    cases = make_cases(prefill, decode, modes, positions, new_tokens, place)
    together = fit_together(sides, cases, place)
    track = run.stage("bench", len(cases) * len(sides))
    groups = [folders] if together else [[folder] for folder in folders]
    models, measured = [], []
    for group in groups:
        loaded = [
            load(folder, device=place, dtype=precision, trust_remote_code=run.trust_remote_code)
            for folder in group
        ]
        merged = [merge(one) if fuse and _compressed(one) else 0 for one in loaded]
        models += [(weigh(one).bytes, count) for one, count in zip(loaded, merged, strict=True)]
        advance = partial(track, len(group))
        measured.append(measure(loaded, cases, new_tokens=new_tokens, repeats=repeats, advance=advance))
        del loaded
        gc.collect()
        if place.type == "cuda":
            torch.cuda.empty_cache()
    by_case = [[side for one in measured for side in one[number]] for number in range(len(cases))]
    described = [Model(name, *facts) for name, facts in zip(names, models, strict=True)]
    return Bench(
        of=described[0],
        against=described[1] if described[1:] else None,
        rows=[
            Row(case, found[0], found[1] if found[1:] else None)
            for case, found in zip(cases, by_case, strict=True)
        ],
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        dtype=str(precision).removeprefix("torch."),
        new_tokens=new_tokens,
        interleaved=together,
        versions=versions("torch", "transformers"),
    )


def _stored(folder: Path) -> torch.dtype:
    stored = read_headers(sorted(folder.glob("*.safetensors"))).values()
    return next((tensor.dtype for tensor in stored if tensor.dtype.is_floating_point), torch.float32)


def _compressed(model: PreTrainedModel) -> bool:
    table = getattr(model.config, "quantization_config", None)
    return isinstance(table, dict) and table.get("quant_method") == "lrc"
