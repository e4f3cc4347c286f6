"""What people see: messages and progress on stderr, results on stdout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

_FILE_WIDTH = 120  # of tables that go to a file or a pipe, which have no width of their own

Track = Callable[[str, int], Callable[[int], object]]


def complain(message: str) -> None:
    """One message on stderr; lines are left whole, so that paths can be copied."""
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def note(message: str) -> None:
    """Something to know that is no result, on stderr."""
    Console(stderr=True, highlight=False).print(Text(message), soft_wrap=True)


def wrote(*paths: object) -> None:
    """Files that a verb wrote, told on stderr."""
    for path in paths:
        note(f"wrote {path}")


def warn(message: str) -> None:
    """Something that may surprise in the result, told on stderr while there is time to stop."""
    note(f"warning: {message}")


def show(*parts: RenderableType) -> None:
    """Print tables and lines of a result on stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str | Text), markup=False)


def show_json(document: Any) -> None:
    """Print a result as the one JSON document of a run."""
    from lrc.records.compression import plain

    value = asdict(document) if is_dataclass(document) and not isinstance(document, type) else document
    print(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False))


@contextmanager
def progress(shown: bool = True) -> Iterator[Track]:
    """A bar on stderr for each stage, with rate and time left; nothing where not ``shown``, or on no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bars:

        def track(label: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(label, total=total, rate="")

            def advance(done: int) -> None:
                bars.advance(task, done)
                found = next(each for each in bars.tasks if each.id == task)
                if speed := found.finished_speed or found.speed:
                    bars.update(task, rate=f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")

            return advance

        yield track


def quiet() -> None:
    """Keep the libraries' own bars and warnings off the screen; what matters of them comes as an error."""
    import warnings

    from datasets.utils import logging as datasets_logging
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    warnings.filterwarnings(
        "ignore", module=r"(torch|transformers|huggingface_hub|datasets|accelerate)(\..*)?$"
    )
    for each in (
        logging,
        hub_logging,
        datasets_logging,
    ):  # of the hub, a line for each time that it tries again
        each.set_verbosity_error()
    logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()
    if not Console(stderr=True).is_terminal:  # on a terminal, gigabytes from the hub should be seen to come
        disable_progress_bars()
