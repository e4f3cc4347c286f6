"""``lrc bench``: how fast a model reads and writes, alone or beside another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from lrc.cli.options import AsJson, Model, Place, Source, names, option, out_option, running
from lrc.cli.screen import result


def _shapes(option: str, listed: str) -> list[tuple[int, int]] | None:
    from lrc.benchmark.cases import parse_shapes

    return parse_shapes(option, names(option, listed))


@dataclass(frozen=True)
class Cases:
    """What is timed."""

    panel: ClassVar = "How it is measured"
    against: str | None = option("Another model to compare with, by turns.", metavar="MODEL", first=True)
    prefill: list[tuple[int, int]] | None = option(
        "Batches of B prompts of N tokens, read at once; or none.",
        metavar="BxN[,BxN...]",
        shown="1x2048,8x2048, or what the models read",
        read=_shapes,
        first=True,
    )
    decode: list[tuple[int, int]] | None = option(
        "Batches of B sequences written a token at a time, up to N tokens; or none.",
        metavar="BxN[,BxN...]",
        shown="1x512,32x512",
        read=_shapes,
        first=True,
    )
    modes: list[str] | None = option(
        "eager, graphs (decode as a CUDA graph) or compile (torch.compile, and a CUDA graph on a GPU).",
        flag="--mode",
        shown="eager,graphs on a GPU, eager on a CPU",
    )
    new_tokens: int = option("Tokens that a sample of decode writes.", 16)
    repeats: int = option("Samples of each model, in turn.", 10)
    fuse: bool = option("Merge products of one input, if compressed.", True, flag="--fuse/--no-fuse")


def verb(
    model: Model,
    cases: Cases,
    place: Place,
    source: Source,
    out: Annotated[Path | None, out_option("Write the figures as JSON too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure tokens per second, time to the first token, weights, KV cache and, of a GPU, peak memory of MODEL."""
    from lrc.checkpoint.durable import check_file, write_file
    from lrc.records.compression import json_text
    from lrc.report.tables import bench_tables
    from lrc.verbs.bench import bench

    if out is not None:
        check_file("-o", out)
    with running(place, source, as_json=as_json, split=False) as run:
        found = bench(model, **vars(cases), run=run)
    if out is not None:
        write_file(out, json_text(found.as_dict()))
    result(found.as_dict(), bench_tables(found), as_json, out)
