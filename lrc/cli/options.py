"""Arguments and options that verbs share, in groups: a verb takes a dataclass, its users an option for each field."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from lrc.cli.processes import processes
from lrc.cli.screen import progress, warn
from lrc.errors import UserError

if TYPE_CHECKING:
    from lrc.run.settings import Run

Model = Annotated[
    str,
    typer.Argument(help="A folder, a hub id, a short name (llama-7b) or a built-in (tiny-gpt2, tiny-llama)."),
]
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
MaxWindows = Annotated[
    int | None, typer.Option(min=1, help="Windows of each perplexity text.", show_default="all")
]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@dataclass(frozen=True)
class Source:
    """How MODEL is opened; fields of ``lrc.Run``."""

    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit, on the hub, of MODEL alone.")
    ] = None
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickled weights (.bin), as weights alone.")
    ] = False
    trust_remote_code: RemoteCode = False


@dataclass(frozen=True)
class Place:
    """Where the model runs; fields of ``lrc.Run``."""

    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="the first GPU if there is one")
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16.", show_default="the checkpoint's on a GPU, float32 on a CPU"
        ),
    ] = None


@dataclass(frozen=True)
class Data:
    """Where texts lie; a field of ``lrc.Run``."""

    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with the data sets, instead of the hub.",
            show_default="the variable LRC_DATA_DIR",
        ),
    ] = None


@dataclass(frozen=True)
class Layers(Data):
    """How layers run one at a time on a calibration text; fields of ``lrc.Run``."""

    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Calibration blocks at once.", show_default="by their length")
    ] = None
    offload: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Where hidden states wait between two layers: device, host or disk.",
            show_default="the first that has room",
        ),
    ] = None


@dataclass(frozen=True)
class PlanOptions:
    """A plan, or how much to keep without one, and entries to replace in it."""

    plan: Annotated[
        str | None,
        typer.Option(
            help="A YAML file, the name of a shipped plan, or YAML that begins with {.",
            show_default="a3, with the sizes that cost least",
        ),
    ] = None
    keep: Annotated[
        float | None,
        typer.Option(metavar="F", help="Fraction of the weights to keep.", show_default="the plan's"),
    ] = None
    entries: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Replace an entry of the plan, such as allocate=uniform or calibration.samples=32; may be repeated.",
        ),
    ] = None

    @property
    def changes(self) -> dict[str, Any]:
        """Values by dotted key. Raises UserError for what is not KEY=VALUE, and for a value that is not YAML."""
        from lrc.plan.document import read_value

        found = {}
        for entry in self.entries or []:
            key, equals, value = entry.partition("=")
            if not (equals and key.strip()):
                raise UserError(f"--set {entry}: write KEY=VALUE, such as keep=0.8 or calibration.samples=32")
            found[key.strip()] = read_value(value, f"--set {entry}")
        return found


def flat(verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb that takes an option for each field of the dataclasses among its parameters."""
    parameters, groups = [], dict[str, Any]()
    kinds = get_type_hints(verb, include_extras=True)
    for name, parameter in inspect.signature(verb).parameters.items():
        if not is_dataclass(kinds[name]):
            parameters.append(parameter.replace(annotation=kinds[name]))
            continue
        groups[name], types = kinds[name], get_type_hints(kinds[name], include_extras=True)
        for field in fields(kinds[name]):
            parameters.append(
                parameter.replace(name=field.name, default=field.default, annotation=types[field.name])
            )

    def run(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        verb(**given, **made)

    run.__doc__, run.__name__ = verb.__doc__, verb.__name__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@contextmanager
def running(*groups: Any, as_json: bool = False, split: bool = True, **given: Any) -> Iterator[Run]:
    """Give a verb its Run: fields of ``groups`` and ``given``, progress and warnings on the screen, and all processes.

    A verb that is not ``split`` runs in one process alone.
    """
    from lrc.run.settings import Run

    for group in groups:
        given |= vars(group)
    with processes(split) as ranks, progress(ranks.first) as track:
        told = None if as_json or not ranks.first else warn
        yield Run(**given, progress=track, warn=told, processes=ranks)


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
