"""The benchmark of a model, alone or against another, and what its figures are held against."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lrc import __version__
from lrc.benchmark.cases import Case, make_cases
from lrc.benchmark.measure import Measured, measure
from lrc.benchmark.needs import CONVERT, fit_together, needs_of
from lrc.benchmark.work import weigh
from lrc.checkpoint.headers import read_headers
from lrc.errors import UserError
from lrc.hub.loader import load
from lrc.hub.names import resolve_model
from lrc.job import find_device, find_dtype
from lrc.modules.fuse import fuse as merge

BENCH_VERSION = 1
NEW_TOKENS, REPEATS = 16, 10

Progress = Callable[[str, int], Callable[[int], object]]


@dataclass(frozen=True)
class Model:
    """A model as the user named it, bytes of its tensors as they ran, and its products that were merged."""

    name: str
    weight_bytes: int
    merged: int


@dataclass(frozen=True)
class Row:
    """One case: our figures, theirs if there is another model, and the ratios between them."""

    case: Case
    ours: Measured
    theirs: Measured | None

    @property
    def speedup(self) -> float | None:
        """Our tokens per second over theirs."""
        return self.theirs and self.ours.tokens_per_second / self.theirs.tokens_per_second

    @property
    def expected(self) -> float | None:
        """What the speedup would be if only bytes read (decode) or operations (prefill) took time."""
        return self.theirs and self.theirs.work / self.ours.work

    @property
    def reached(self) -> float | None:
        """The speedup over what it would be."""
        return self.speedup / self.expected if self.speedup and self.expected else None

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        sides = {
            name: asdict(side) | {"tokens_per_second": side.tokens_per_second, "spread": side.spread}
            for name, side in (("ours", self.ours), ("theirs", self.theirs))
            if side
        }
        ratios = {"speedup": self.speedup, "expected": self.expected, "reached": self.reached}
        of = {"prefill": "operations", "decode": "bytes"}[self.case.phase]
        return {**asdict(self.case), **sides, **(ratios | {"expected_of": of} if self.theirs else {})}


@dataclass(frozen=True)
class Bench:
    """All figures of a run. ``interleaved``: samples were taken of both models in turn; else one model was measured
    after the other, as they do not fit on the device together.
    """

    of: Model
    against: Model | None
    rows: list[Row]
    device: str
    dtype: str
    new_tokens: int
    interleaved: bool
    versions: dict[str, str]
    version: int = BENCH_VERSION

    @property
    def warnings(self) -> list[str]:
        """Cases in which a model of no more bytes is slower, and what else a reader of the ratios has to know."""
        if self.against is None:
            return []
        found = []
        if self.of.weight_bytes <= self.against.weight_bytes:
            found = [
                f"{row.case}: {self.of.name} is slower than {self.against.name}, {row.speedup:.3f} of its tokens per "
                f"second, with {self.of.weight_bytes / self.against.weight_bytes:.3f} of its weights"
                for row in self.rows
                if row.speedup is not None and row.speedup < 1
            ]
        if not self.interleaved:
            found.append(
                "the models do not fit on the device together, so one was measured after the other: a device that is "
                "warmer or shared by then counts against the second"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        own = {key: value for key, value in vars(self).items() if key not in ("of", "against", "rows")}
        models = {"of": asdict(self.of), "against": self.against and asdict(self.against)}
        return {**own, **models, "rows": [row.as_dict() for row in self.rows], "warnings": self.warnings}


def bench(
    model: str | Path,
    against: str | Path | None = None,
    *,
    prefill: Sequence[tuple[int, int]] | None = None,
    decode: Sequence[tuple[int, int]] | None = None,
    modes: Sequence[str] | None = None,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    device: str | None = None,
    dtype: str | None = None,
    fuse: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Bench:
    """Measure how fast a model reads and writes, and another beside it in turn where both fit on the device.

    ``prefill`` and ``decode`` are pairs of a batch and a length, ``modes`` keys of ``lrc.benchmark.cases.MODES``; a
    sample of decode writes ``new_tokens``. Where ``fuse``, products of a compressed model are merged (``lrc.fuse``); an
    original runs as transformers runs it. Raises UserError for models that cannot be had or run, or do not fit on the
    device.
    """
    place = find_device(device)
    names = [str(name) for name in (model, against) if name is not None]
    folders = [resolve_model(str(model), revision=revision, remedy=CONVERT).path]
    folders += [resolve_model(str(against), remedy=CONVERT).path] if against is not None else []
    for name, number in (("--new-tokens", new_tokens), ("--repeats", repeats)):
        if number < 1:
            raise UserError(f"{name} {number}: the smallest is 1")
    precision = find_dtype(dtype, place, _stored(folders[0]))
    sides = [
        needs_of(name, folder, precision, place, trusted=trust_remote_code)
        for name, folder in zip(names, folders, strict=True)
    ]
    positions = min(side.positions for side in sides)
    cases = make_cases(prefill, decode, modes, positions, new_tokens, place)
    together = fit_together(sides, cases, place)
    track = (progress or (lambda label, total: lambda done: None))("bench", len(cases) * len(sides))
    groups = [folders] if together else [[folder] for folder in folders]
    models, measured = [], []
    for group in groups:
        loaded = [
            load(folder, device=place, dtype=precision, trust_remote_code=trust_remote_code)
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
        against=described[1] if against is not None else None,
        rows=[
            Row(case, found[0], found[1] if len(found) > 1 else None)
            for case, found in zip(cases, by_case, strict=True)
        ],
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        dtype=str(precision).removeprefix("torch."),
        new_tokens=new_tokens,
        interleaved=together,
        versions={"lrc": __version__, **{name: version(name) for name in ("torch", "transformers")}},
    )


def _stored(folder: Path) -> torch.dtype:
    stored = read_headers(sorted(folder.glob("*.safetensors"))).values()
    return next((tensor.dtype for tensor in stored if tensor.dtype.is_floating_point), torch.float32)


def _compressed(model: PreTrainedModel) -> bool:
    table = getattr(model.config, "quantization_config", None)
    return isinstance(table, dict) and table.get("quant_method") == "lrc"
