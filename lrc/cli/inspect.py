"""``lrc inspect``: what a model is made of and what compresses in it; or what an output of it has lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from lrc.cli.options import AsJson, Inputs, Layers, Model, calib_option, names, option, out_option, running
from lrc.cli.screen import result


@dataclass(frozen=True)
class Scope:
    """What is inspected."""

    panel: ClassVar = "What is inspected"
    against: Path | None = option("An lrc output of MODEL, to compare with it.", metavar="OUT", first=True)
    layers: str | None = option(
        "These layers alone, each by itself; -1 is the last.", metavar="N[-M],...", shown="all, by target"
    )
    targets: list[str] | None = option("qk, ov, mlp, q, k, v, o ...; embed, lm_head.", read=names)
    tables: bool = option("The embedding and the head too.", False)
    method_names: list[str] | None = option("Methods to estimate.", flag="--methods", shown="all that apply")
    keeps: list[float] | None = option(
        "Fractions of each target at which to estimate what methods lose.",
        shown="0.9,0.8,0.6,0.4",
        first=True,
    )
    gradients: bool = option("What errors cost the loss too, by a sweep back.", False)


@dataclass(frozen=True)
class Blocks:
    """The calibration text."""

    panel: ClassVar = Inputs.panel
    calib: str | None = calib_option("wikitext2, for a built-in its own text")
    samples: int = option("Blocks of calibration text.", 32, least=1)
    seq_len: int | None = option("Tokens of a block.", least=2, shown="2048, or the model's limit")


def verb(
    model: Model,
    scope: Scope,
    layers: Layers,
    text: Blocks,
    inputs: Inputs,
    out: Annotated[Path | None, out_option("Write inspect.json and inspect.html there.", None)] = None,
    as_json: AsJson = False,
) -> None:
    """Show spectra, ranks, conditioning, predicted errors and what auto would take, layer by layer of MODEL."""
    from lrc.report.inspection import check_folder, inspection_tables, write_inspection
    from lrc.verbs.inspect import inspect_model

    if out is not None:
        check_folder(out)
    with running(layers, inputs, as_json=as_json, split=False) as run:
        found = inspect_model(model, **vars(scope), **vars(text), run=run)
    written = [] if out is None else write_inspection(found, out)
    result(found, inspection_tables(found, by_layer=scope.layers is not None), as_json, *written)
