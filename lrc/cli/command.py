"""Parse the command line, call a verb, report errors and interrupts, and choose the exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from lrc.cli.interrupt import INTERRUPTED
from lrc.cli.options import flat
from lrc.cli.screen import complain, speaks
from lrc.errors import Paused, UserError, nearest
from lrc.run.versions import __version__

_MISTAKE = 2  # exit code
_VERBS = ("compress", "eval", "compare", "plan", "bench", "check", "verify", "inspect", "list")
_SPLIT = ("compress", "eval", "plan")  # run in several processes; the other verbs in the first alone
# Raised for words that do not parse. Typer has no name for it, and its module depends on typer's version.
_Unparsed = cast(type[Exception], typer.BadParameter.__bases__[0])


class _PlainFlags:
    """Show no type of flags in the help."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class _Verb(_PlainFlags, TyperCommand):
    """A verb of the command line."""


class _Verbs(_PlainFlags, TyperGroup):
    """Report a user's mistake in one message; any other error keeps its traceback."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        with _mistakes() if args else nullcontext():  # without words it asks for help
            return super().make_context(info_name, args, *rest, **extra)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if self.get_command(ctx, args[0]) is None:
            raise UserError(f"there is no verb {args[0]!r}; {nearest(args[0], self.list_commands(ctx))}")
        if args[0] not in _SPLIT and not speaks():
            raise typer.Exit
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _mistakes():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            resumes = ctx.invoked_subcommand == "compress" or isinstance(error, Paused)
            then = (
                "run the same command again to resume"
                if resumes
                else "the same command starts from the beginning"
            )
            if speaks():
                complain(f"interrupted; {then}")
            raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _mistakes() -> Iterator[None]:
    try:
        yield
    except (UserError, _Unparsed) as error:
        if speaks(error):
            complain(str(error) if isinstance(error, UserError) else _in_our_words(error))
        raise typer.Exit(_MISTAKE) from None


def _in_our_words(error: Any) -> str:
    """Return a message about words that do not parse: the option, its value, and the nearest choice or the help."""
    if hasattr(error, "possibilities"):  # an option that is not there
        options = (option for option in error.ctx.command.params if option.param_type_name == "option")
        known = [name for option in options for name in (*option.opts, *option.secondary_opts)]
        unknown = error.option_name
        return f"{error.ctx.command_path} has no option {unknown}; {nearest(unknown, known)}"
    message, option = error.format_message().rstrip("."), getattr(error, "param", None)
    if option is not None and error.message:
        reasons = getattr(error.__cause__, "errors", list)()  # of pydantic, by which newer typers parse
        value = f" {reasons[0]['input']!r}" if reasons else ""
        message = f"{option.opts[0]}{value}: {error.message.removeprefix('Input ').rstrip('.')}"
    where = f"; see {error.ctx.command_path} --help" if error.ctx else ""
    return f"{message[0].lower()}{message[1:]}{where}"


app = typer.Typer(
    name="lrc",
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name in _VERBS:
    app.command(name, cls=_Verb)(flat(import_module(f"lrc.cli.{name}").verb))


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lrc {__version__}")
        raise typer.Exit


@app.callback()
def _lrc(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit."),
    ] = False,
) -> None:
    """Make Hugging Face checkpoints smaller and faster by low-rank factorization, and report the cost."""
