"""``lrc bench``: how fast a model reads and writes, alone or beside another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lrc.cli.options import AsJson, Model, Place, Source, names, running
from lrc.cli.screen import quiet, show, show_json, wrote


def bench_model(
    model: Model,
    *,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Another model, measured in turn, such as the original."),
    ] = None,
    prefill: Annotated[
        str | None,
        typer.Option(
            metavar="BxN[,BxN...]",
            help="Batches of B prompts of N tokens, read at once; or none.",
            show_default="1x2048,8x2048, or what the models read",
        ),
    ] = None,
    decode: Annotated[
        str | None,
        typer.Option(
            metavar="BxN[,BxN...]",
            help="Batches of B sequences written a token at a time, up to N tokens; or none.",
            show_default="1x512,32x512",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME]",
            help="eager, graphs (decode as a CUDA graph) or compile (torch.compile, and a CUDA graph on a GPU).",
            show_default="eager,graphs on a GPU, eager on a CPU",
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens that a sample of decode writes.")] = 16,
    repeats: Annotated[int, typer.Option(help="Samples of each model, in turn.")] = 10,
    fuse: Annotated[
        bool,
        typer.Option("--fuse/--no-fuse", help="Merge the products of one input in a compressed model."),
    ] = True,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Write the figures as JSON besides.")
    ] = None,
    place: Place,
    source: Source,
    as_json: AsJson = False,
) -> None:
    """Measure tokens per second, time to the first token, weights, KV cache and, of a GPU, peak memory of MODEL."""
    quiet()
    from lrc.benchmark.cases import parse_shapes
    from lrc.checkpoint.durable import check_file, write_text, written
    from lrc.report.tables import speeds
    from lrc.verbs.bench import bench

    if out is not None:
        check_file("-o", out)
    shapes = [
        parse_shapes(option, names(option, listed))
        for option, listed in (("--prefill", prefill), ("--decode", decode))
    ]
    with running(place, source, as_json=as_json, split=False) as run:
        found = bench(
            model,
            against,
            prefill=shapes[0],
            decode=shapes[1],
            modes=names("--mode", mode),
            new_tokens=new_tokens,
            repeats=repeats,
            fuse=fuse,
            run=run,
        )
    if out is not None:
        with written(out):
            write_text(out, json.dumps(found.as_dict(), indent=2, ensure_ascii=False) + "\n")
    if as_json:
        show_json(found.as_dict())
        return
    show(*speeds(found))
    if out is not None:
        wrote(out)
