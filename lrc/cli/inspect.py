"""``lrc inspect``: what a model is made of and what compresses in it; or what an output of it has lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lrc.cli.options import AsJson, Layers, Model, Place, Source, fractions, names, running
from lrc.cli.screen import quiet, show, show_json, wrote


@dataclass(frozen=True)
class Scope:
    """What is looked at, and what is found of it."""

    layers: Annotated[
        str | None,
        typer.Option(
            metavar="N[-M],...",
            help="These layers alone, each by itself; -1 is the last.",
            show_default="all, by target",
        ),
    ] = None
    targets: Annotated[
        str | None,
        typer.Option(metavar="NAME[,NAME...]", help="qk, ov, mlp, q, k, v, o ...; embed, lm_head."),
    ] = None
    tables: Annotated[bool, typer.Option("--tables", help="The embedding and the head too.")] = False
    methods: Annotated[
        str | None,
        typer.Option(metavar="NAME[,NAME...]", help="Methods to estimate.", show_default="all that apply"),
    ] = None
    keeps: Annotated[
        str | None,
        typer.Option(
            metavar="F[,F...]",
            help="Fractions of each target at which to estimate what methods lose.",
            show_default="0.9,0.8,0.6,0.4",
        ),
    ] = None
    gradients: Annotated[
        bool, typer.Option("--gradients", help="What errors cost the loss too, by a sweep back.")
    ] = False


@dataclass(frozen=True)
class Blocks:
    """The text that moments are taken of."""

    calib: Annotated[
        str | None,
        typer.Option(
            metavar="DATA[=W],...",
            help="Texts to take moments of, with weights or without: as for lrc eval --ppl, or synthetic, which the "
            "model itself writes.",
            show_default="wikitext2, for a built-in its own text",
        ),
    ] = None
    samples: Annotated[int, typer.Option(min=1, help="Blocks of calibration text.")] = 32
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a block.", show_default="2048, or the model's limit")
    ] = None


def inspect(
    model: Model,
    *,
    against: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="The folder of an lrc output of MODEL, to hold against it."),
    ] = None,
    scope: Scope,
    text: Blocks,
    layers: Layers,
    place: Place,
    source: Source,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="Write inspect.json and inspect.html there."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show spectra, ranks, conditioning, predicted errors and what auto would take, layer by layer of MODEL."""
    quiet()
    from lrc.report.inspected import inspection_tables
    from lrc.report.inspection_page import check_folder, write_inspection
    from lrc.verbs.inspect import inspect_model

    if out is not None:
        check_folder(out)
    with running(layers, place, source, as_json=as_json, split=False) as run:
        found = inspect_model(
            model,
            against=against,
            keeps=None if scope.keeps is None else fractions("--keeps", scope.keeps),
            method_names=names("--methods", scope.methods),
            layers=scope.layers,
            targets=names("--targets", scope.targets),
            tables=scope.tables,
            gradients=scope.gradients,
            calib=text.calib,
            samples=text.samples,
            seq_len=text.seq_len,
            run=run,
        )
    written = [] if out is None else write_inspection(found, out)
    if as_json:
        show_json(found)
    else:
        show(*inspection_tables(found, by_layer=scope.layers is not None))
        wrote(*written)
