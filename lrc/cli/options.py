"""Arguments and options that verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lrc.errors import UserError

Model = Annotated[
    str,
    typer.Argument(help="A folder, a hub id, a short name (llama-7b) or a built-in (tiny-gpt2, tiny-llama)."),
]
PlanName = Annotated[str, typer.Option("--plan", help="A YAML file, or the name of a shipped plan.")]
Texts = Annotated[
    str | None,
    typer.Option(
        "--ppl",
        metavar="NAME[,NAME]",
        help="Perplexity texts: wikitext2, c4, ptb, pile, builtin or a file.",
        show_default="wikitext2; builtin for the built-in models",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="DATA[=W],...",
        help="Calibration texts instead of the plan's, with weights or without: as for --ppl, or synthetic, which the "
        "model itself writes.",
        show_default="the plan's, else as for --ppl",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder with the data sets, instead of the hub.",
        show_default="the variable LRC_DATA_DIR",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="the first GPU if there is one")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16.", show_default="the checkpoint's on a GPU, float32 on a CPU"
    ),
]
States = Annotated[
    str | None,
    typer.Option(
        metavar="PLACE",
        help="Where hidden states wait between two layers: device, host or disk.",
        show_default="the first that has room",
    ),
]
MaxWindows = Annotated[
    int | None, typer.Option(min=1, help="Windows of each perplexity text.", show_default="all")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit, on the hub, of MODEL alone.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pickled weights (.bin), as weights alone.")
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def names(option: str, listed: str | None) -> list[str] | None:
    """The items of an option's list with commas; None where none is given, UserError where it is empty."""
    if listed is None:
        return None
    if found := [name.strip() for name in listed.split(",") if name.strip()]:
        return found
    raise UserError(f"{option} {listed!r} is empty; name something, or leave it out")


def lengths(option: str, listed: str) -> list[int]:
    """The whole numbers of an option's list with commas; UserError where one is none, or there is none."""
    found = []
    for word in names(option, listed) or []:
        if not word.isdecimal():
            raise UserError(f"{option} {listed}: {word!r} is no whole number; write such as 512,1024")
        found.append(int(word))
    return found


def fractions(option: str, listed: str) -> list[float]:
    """The numbers of an option's list with commas; UserError where one is none, or there is none."""
    found = []
    for word in names(option, listed) or []:
        try:
            found.append(float(word))
        except ValueError:
            raise UserError(
                f"{option} {listed}: {word!r} is not a number; write such as 0.8 or 0.8,0.6"
            ) from None
    return found
