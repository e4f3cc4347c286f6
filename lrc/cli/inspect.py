"""``lrc inspect``: show how well each target of a model compresses, or compare an output with the original."""

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
    against: Path | None = option("An lrc output of MODEL to compare with MODEL.", metavar="OUT", first=True)
    layers: str | None = option(
        "Inspect only these layers, with a row for each; -1 is the last.",
        metavar="N[-M],...",
        shown="all, with a row for each target",
    )
    targets: list[str] | None = option(
        "Targets to inspect: qk, ov, mlp, q, k, v, o and so on; embed or lm_head.", read=names
    )
    tables: bool = option("Also inspect the embedding and the LM head.", False)
    methods: list[str] | None = option("Methods whose errors to predict.", shown="all that apply")
    keeps: list[float] | None = option(
        "Kept fractions at which to predict the errors.",
        shown="0.9,0.8,0.6,0.4",
        first=True,
    )
    gradients: bool = option(
        "Also predict the rise of the loss, by a backward sweep through the model.", False
    )


@dataclass(frozen=True)
class Blocks:
    """The calibration text."""

    panel: ClassVar = Inputs.panel
    calib: str | None = calib_option("general; builtin for the built-in models")
    samples: int = option("Blocks of calibration text.", 32, least=1)
    seq_len: int | None = option("Tokens in a block.", least=2, shown="2048, or the model's limit")


def verb(
    model: Model,
    scope: Scope,
    layers: Layers,
    text: Blocks,
    inputs: Inputs,
    out: Annotated[
        Path | None, out_option("Write inspect.json and inspect.html into this folder.", "DIR")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show spectra, ranks, conditioning, predicted errors and the best method for each target of MODEL."""
    from lrc.report.inspection import check_folder, inspection_tables, write_inspection
    from lrc.verbs.inspect import inspect_model

    if out is not None:
        check_folder(out)
    with running(layers, inputs, as_json=as_json, split=False) as run:
        found = inspect_model(model, **vars(scope), **vars(text), run=run)
    written = [] if out is None else write_inspection(found, out)
    result(found, inspection_tables(found, by_layer=scope.layers is not None), as_json, *written)
