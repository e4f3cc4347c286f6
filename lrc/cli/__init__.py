"""The command line: one file a verb, each of which parses, calls the library and prints."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lrc import __version__
from lrc.cli.check import check_plan
from lrc.cli.compress import compress_model
from lrc.cli.eval import evaluate
from lrc.cli.list import list_known
from lrc.cli.plan import plan_model
from lrc.cli.screen import complain
from lrc.errors import UserError

_MISTAKE, _INTERRUPTED = 2, 130


class _Verbs(TyperGroup):
    """Tells a user's mistake in one message; what is no mistake of the user's keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            complain(str(error))
            raise typer.Exit(_MISTAKE) from None
        except KeyboardInterrupt:
            complain("interrupted; run the same command again to go on")
            raise typer.Exit(_INTERRUPTED) from None


app = typer.Typer(
    name="lrc",
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compress")(compress_model)
app.command("eval")(evaluate)
app.command("plan")(plan_model)
app.command("check")(check_plan)
app.command("list")(list_known)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lrc {__version__}")
        raise typer.Exit


@app.callback()
def _lrc(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop."),
    ] = False,
) -> None:
    """Make Hugging Face checkpoints smaller and faster by low-rank factorization, and say what that cost."""


def main() -> None:
    """Run the command line; leaves with 0, 2 for a user's mistake, 130 if interrupted, 1 for a failure of ours."""
    app(prog_name="lrc")
