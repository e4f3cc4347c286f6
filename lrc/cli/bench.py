"""``lrc bench``: measure the speed and memory of a model, alone or against another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from lrc.cli.options import AsJson, Model, Place, Repository, names, option, out_option, running
from lrc.cli.screen import result


def _shapes(option: str, listed: str) -> list[tuple[int, int]] | None:
    from lrc.benchmark.cases import parse_shapes

    return parse_shapes(option, names(option, listed))


@dataclass(frozen=True)
class Cases:
    """What is timed."""

    panel: ClassVar = "How it is measured"
    against: str | None = option(
        "Another model to compare with; both are measured in alternation.", metavar="MODEL", first=True
    )
    prefill: list[tuple[int, int]] | None = option(
        "Prefill: batches of B prompts with N tokens each; or none.",
        metavar="BxN[,BxN...]",
        shown="1x2048,8x2048, or the models' limit",
        read=_shapes,
        first=True,
    )
    decode: list[tuple[int, int]] | None = option(
        "Decode: batches of B sequences, generated token by token up to N tokens; or none.",
        metavar="BxN[,BxN...]",
        shown="1x512,32x512",
        read=_shapes,
        first=True,
    )
    modes: list[str] | None = option(
        "eager, graphs (decode as a CUDA graph) or compile (torch.compile, and a CUDA graph on a GPU).",
        shown="eager,graphs on a GPU, eager on a CPU",
    )
    new_tokens: int = option("Tokens that each decode sample generates.", 16)
    repeats: int = option("Samples of each model.", 10)
    fuse: bool = option(
        "In a compressed model, run projections of one input as one product.", True, flag="--fuse/--no-fuse"
    )


def verb(
    model: Model,
    cases: Cases,
    place: Place,
    repository: Repository,
    out: Annotated[Path | None, out_option("Also write the results to this file, as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure tokens per second, time to first token, weights, KV cache and (on a GPU) peak memory of MODEL."""
    from lrc.checkpoint.durable import check_file, write_file
    from lrc.records.compression import json_text
    from lrc.report.benchmark import bench_tables
    from lrc.verbs.bench import bench

    if out is not None:
        check_file("-o", out)
    with running(place, repository, as_json=as_json, split=False) as run:
        found = bench(model, **vars(cases), run=run)
    if out is not None:
        write_file(out, json_text(found.as_dict()))
    result(found.as_dict(), bench_tables(found), as_json, out)
