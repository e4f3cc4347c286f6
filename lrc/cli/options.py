"""Turn dataclasses into groups of options: a field is an option, a class a titled panel of the help."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_type_hints

import typer

from lrc.cli.progress import progress
from lrc.cli.screen import quiet, warn
from lrc.errors import UserError

if TYPE_CHECKING:
    from lrc.run.settings import Run

MODEL_HELP = (
    "A folder, a GGUF file, a PEFT adapter, a hub id, a short name (llama-7b) or a built-in model "
    "(tiny-gpt2, tiny-llama)."
)
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def out_option(help: str, metavar: str | None = "FILE") -> Any:
    """Make the option ``-o`` of a verb: a file or folder for its result."""
    return typer.Option("-o", "--out", metavar=metavar, help=help)


def option(
    help: str,
    default: Any = None,
    *,
    flag: str = "",
    metavar: str | None = None,
    shown: str | None = None,
    least: int | None = None,
    read: Callable[[str, Any], Any] | None = None,
    first: bool = False,
) -> Any:
    """Make a dataclass field that is an option.

    ``flag``: names on the command line (default: the field's name). ``shown``: the default in words. ``least``: the
    smallest number. ``read``: a function of the option's long name and text that returns the field's value. ``first``:
    show the option in the first panel of the help, not in the panel of its group.
    """
    how = {"help": help, "show_default": shown or True, "min": least}
    return field(
        default=default,
        metadata={"flag": flag, "metavar": metavar, "read": read, "first": first, "typer": how},
    )


def calib_option(shown: str) -> Any:
    """Make the option for calibration texts; ``shown``: the default in words."""
    texts = "Calibration texts, weighted or not: general, a name of lrc list data, a file of text or chats, synthetic."
    return option(texts, metavar="DATA[=W],...", shown=shown)


def names(option: str, listed: str) -> list[str]:
    """Return the words of a list with commas. Raises UserError for an empty list."""
    if found := [name.strip() for name in listed.split(",") if name.strip()]:
        return found
    raise UserError(f"{option} {listed!r} is empty; name something, or leave it out")


def _numbers(kind: type, what: str, option: str, listed: str) -> list[Any]:
    """Return the numbers of a list with commas. Raises UserError for any other word."""
    found = []
    for word in names(option, listed):
        try:
            found.append(kind(word))
        except ValueError:
            raise UserError(f"{option} {listed}: {word!r} is not {what}") from None
    return found


def _changes(option: str, entries: Sequence[str]) -> dict[str, Any]:
    """Return values by dotted key. Raises UserError for an entry that is not KEY=VALUE with a value in YAML."""
    from lrc.plan.document import read_value

    found = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not (equals and key.strip()):
            raise UserError(f"{option} {entry}: write KEY=VALUE, such as keep=0.8 or calibration.samples=32")
        found[key.strip()] = read_value(value, f"{option} {entry}")
    return found


@dataclass(frozen=True)
class PlanOptions:
    """A plan or a fraction to keep, and entries to replace in the plan."""

    panel: ClassVar = None
    plan: str | None = option(
        "The plan: a YAML file, a name (see lrc list plans), or YAML text that begins with {.",
        shown="method a3, with the sizes of least cost",
    )
    keep: float | None = option("Fraction of the weights to keep.", shown="the plan's")
    changes: dict[str, Any] | None = option(
        "Replace an entry of the plan, such as allocate=uniform or calibration.samples=32; may be repeated.",
        flag="--set",
        metavar="KEY=VALUE",
        read=_changes,
    )


@dataclass(frozen=True)
class Texts:
    """Texts to measure perplexity on."""

    panel: ClassVar = "Perplexity"
    ppl: list[str] | None = option(
        "Texts to measure perplexity on: wikitext2, c4, ptb, pile, builtin, a file or FILE:COLUMN.",
        shown="wikitext2,c4; builtin for the built-in models",
        first=True,
    )
    max_windows: int | None = option("Windows of each text to measure, from its start.", least=1, shown="all")


@dataclass(frozen=True)
class Place:
    """Where the model runs; fields of ``lrc.Run``."""

    panel: ClassVar = "Where it runs"
    device: str | None = option("cpu, cuda or cuda:N.", shown="the first GPU, if there is one")
    dtype: str | None = option(
        "Precision of the layers: float32, bfloat16 or float16.", shown="as stored; float32 on a CPU"
    )


@dataclass(frozen=True)
class Layers(Place):
    """How layers run one at a time on calibration text; fields of ``lrc.Run``."""

    batch_size: int | None = option(
        "Calibration blocks that run at once.", least=1, shown="chosen by their length"
    )
    offload: str | None = option(
        "Where hidden states are kept between two layers: device, host or disk.",
        metavar="PLACE",
        shown="the first with enough room",
    )


@dataclass(frozen=True)
class Calibration:
    """The calibration texts."""

    panel: ClassVar = "Where the model and the texts come from"
    calib: str | None = calib_option("the plan's, else general; builtin for the built-in models")


@dataclass(frozen=True)
class Repository:
    """Where MODEL comes from; fields of ``lrc.Run``."""

    panel: ClassVar = "Where the model comes from"
    revision: str | None = option("Branch, tag or commit of MODEL on the hub.")
    trust_remote_code: bool = option("Run Python code that comes with the checkpoint.", False)


@dataclass(frozen=True)
class Source(Repository):
    """How MODEL is opened; fields of ``lrc.Run``."""

    allow_pickle: bool = option("Also read weights in pickle files (.bin). Code in them is not run.", False)


@dataclass(frozen=True)
class Inputs(Source):
    """How MODEL and texts are opened; fields of ``lrc.Run``."""

    panel: ClassVar = Calibration.panel
    data_dir: Path | None = option(
        "Folder to read data sets from, instead of the hub.", shown="$LRC_DATA_DIR"
    )


# How the text of an option becomes a list, and how a value of a type is shown in the help.
_READ: dict[Any, Callable[[str, Any], Any]] = {
    list[str]: names,
    list[int]: partial(_numbers, int, "a whole number; write such as 512,1024"),
    list[float]: partial(_numbers, float, "a number; write such as 0.8 or 0.8,0.6"),
}
_METAVAR = {list[str]: "NAME[,NAME]", list[int]: "N[,N...]", list[float]: "F[,F...]", float: "F", Path: "DIR"}


def flat(verb: Callable[..., None]) -> Callable[..., None]:
    """Return a verb whose dataclass parameters are replaced by one option for each of their fields."""
    parameters, groups, readers = [], dict[str, Any](), dict[str, Callable[[Any], Any]]()
    kinds = get_type_hints(verb, include_extras=True)
    for name, parameter in inspect.signature(verb).parameters.items():
        parameter = parameter.replace(annotation=kinds[name], kind=inspect.Parameter.KEYWORD_ONLY)
        if not is_dataclass(kinds[name]):
            parameters.append(parameter)
            continue
        groups[name], types = kinds[name], get_type_hints(kinds[name])
        for each in fields(groups[name]):
            how, kind = each.metadata, types[each.name]
            bare = (*get_args(kind), kind)[0]  # without None
            if read := how["read"] or _READ.get(bare):
                readers[each.name] = partial(read, flags(each)[-1])
                kind = list[str] | None if bare == dict[str, Any] else str | None
            made = typer.Option(
                *flags(each),
                metavar=how["metavar"] or _METAVAR.get(bare),
                rich_help_panel=None if how["first"] else groups[name].panel,
                **how["typer"],
            )
            annotation = Annotated[kind, made]
            parameters.append(parameter.replace(name=each.name, default=each.default, annotation=annotation))

    def run(**given: Any) -> None:
        quiet()
        for name, read in readers.items():
            if given[name] is not None:
                given[name] = read(given[name])
        for name, group in groups.items():
            given[name] = group(**{each.name: given.pop(each.name) for each in fields(group)})
        verb(**given)

    run.__doc__, run.__name__ = verb.__doc__, verb.__name__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def flags(option: Field[Any]) -> Sequence[str]:
    """Return the names of an option on the command line; the long name is last."""
    return option.metadata["flag"].split() or [f"--{option.name.replace('_', '-')}"]


@contextmanager
def running(*groups: Any, as_json: bool = False, split: bool = True, **given: Any) -> Iterator[Run]:
    """Yield the Run of a verb, with the fields of ``groups`` and ``given``; show its progress and warnings.

    ``split``: the verb runs in all processes of a launcher, else in one.
    """
    from lrc.run.processes import ALONE, launched
    from lrc.run.settings import Run

    for group in groups:
        given |= vars(group)
    with launched() if split else nullcontext(ALONE) as joined, progress(joined.first) as track:
        yield Run(**given, progress=track, warn=None if as_json else warn, processes=joined)
