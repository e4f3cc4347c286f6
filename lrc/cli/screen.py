"""Print messages on stderr and results on stdout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from lrc.errors import ProcessEnded
from lrc.run.launcher import own_rank

if TYPE_CHECKING:
    from rich.console import RenderableType

_FILE_WIDTH = 120  # columns of tables in a file or a pipe


def speaks(error: Exception | None = None) -> bool:
    """Return whether this process prints.

    The first process prints. If a process ended, the first one to notice that prints the ``error``.
    """
    return not error.reported if isinstance(error, ProcessEnded) else own_rank().rank == 0


def complain(message: str) -> None:
    """Print an error on stderr, without wrapping lines, so that paths can be copied."""
    line = Text.assemble(("error: ", "bold red"), message)
    Console(stderr=True, highlight=False).print(line, soft_wrap=True)


def note(message: str) -> None:
    """Print a message on stderr, in the first of several processes."""
    if speaks():
        Console(stderr=True, highlight=False).print(Text(message), soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    note(f"warning: {message}")


def result(found: Any, parts: Iterable[RenderableType], as_json: bool, *files: object) -> None:
    """Print a result as one JSON document, or as tables and lines followed by the files that were written."""
    from lrc.records.compression import json_text

    if not speaks():
        return
    if as_json:
        document = asdict(found) if is_dataclass(found) and not isinstance(found, type) else found
        print(json_text(document), end="")
        return
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str | Text), markup=False)
    for file in files:
        if file is not None:
            note(f"wrote {file}")


def quiet() -> None:
    """Hide the progress bars and warnings of other libraries; lrc reports what matters as an error."""
    import warnings

    from datasets.utils import logging as datasets_logging
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    warnings.filterwarnings(
        "ignore", module=r"(torch|transformers|huggingface_hub|datasets|accelerate)(\..*)?$"
    )
    for each in (logging, hub_logging, datasets_logging):  # the hub library logs each retry
        each.set_verbosity_error()
    logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()
    if not Console(stderr=True).is_terminal:  # on a terminal, downloads from the hub show their progress
        disable_progress_bars()
