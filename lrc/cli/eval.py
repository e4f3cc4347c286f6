"""``lrc eval``: perplexity and tasks of a checkpoint, by itself or beside another, and what shrinking parts costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrc.cli.options import (
    AsJson,
    Data,
    MaxWindows,
    Place,
    Source,
    Texts,
    fractions,
    lengths,
    names,
    running,
)
from lrc.cli.processes import speaks
from lrc.cli.screen import note, quiet, show, show_json, wrote
from lrc.errors import Paused, UserError

if TYPE_CHECKING:
    from lrc.records.comparison import Comparison
    from lrc.run.settings import Run


@dataclass(frozen=True)
class Windows:
    """The windows that perplexity is measured on."""

    seq_len: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens of a window.", show_default="2048, or the limit of the shorter model"
        ),
    ] = None
    context: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help="Several lengths of windows, a figure for each on the same part of the text; --max-windows counts "
            "those of the longest.",
        ),
    ] = None
    max_windows: MaxWindows = None

    @property
    def lengths(self) -> int | list[int] | None:
        """Tokens of a window, one length or several. Raises UserError where both options are given."""
        if self.context is None:
            return self.seq_len
        if self.seq_len is not None:
            raise UserError("--seq-len and --context contradict each other; write all lengths into --context")
        return lengths("--context", self.context)


@dataclass(frozen=True)
class AblationOptions:
    """What shrinking each part alone costs."""

    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate",
            help="Perplexity with each projection and component of MODEL, an original, alone shrunk in all layers, and "
            "a heat map.",
            rich_help_panel="Ablation",
        ),
    ] = False
    keeps: Annotated[
        str | None,
        typer.Option(
            metavar="F[,F...]",
            help="Fractions of its weights that a target keeps.",
            show_default="0.5,0.25,0.125",
            rich_help_panel="Ablation",
        ),
    ] = None
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What shrinks all that it can.",
            show_default="a3 components, whitened_svd projections",
            rich_help_panel="Ablation",
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Calibration blocks at once.",
            show_default="by their length",
            rich_help_panel="Ablation",
        ),
    ] = None
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="DATA[=W],...",
            help="Calibration texts, as for compress.",
            show_default="wikitext2; builtin for the built-in models",
            rich_help_panel="Ablation",
        ),
    ] = None
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Measure anew, whatever results there are here.", rich_help_panel="Ablation"
        ),
    ] = False


@dataclass(frozen=True)
class TaskOptions:
    """Tasks of lm-evaluation-harness."""

    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME]",
            help="Tasks of lm-evaluation-harness, instead of a perplexity where no --ppl names one.",
            rich_help_panel="Tasks",
        ),
    ] = None
    tasks_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with YAML files of more tasks.", rich_help_panel="Tasks"),
    ] = None


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(help="As for compress.", show_default="the newest lrc output under this folder"),
    ] = None,
    *,
    ppl: Texts = None,
    windows: Windows,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Another model, usually the original, beside it token by token."),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE.parquet", help="Keep the results of every token.")
    ] = None,
    ablation: AblationOptions,
    asked: TaskOptions,
    data: Data,
    place: Place,
    streamed: Annotated[
        bool | None,
        typer.Option(
            "--streamed/--whole",
            help="Run the model a layer at a time, or load it whole; the figure is the same.",
            show_default="whole where it fits",
        ),
    ] = None,
    source: Source,
    as_json: AsJson = False,
) -> None:
    """Measure MODEL by perplexity and tasks; what it lost of another model; or what shrinking each part alone costs."""
    quiet()
    from lrc.report.tables import evaluation

    texts = names("--ppl", ppl)
    unlike = {"--against": against, "--context": windows.context, "--tokens": tokens, "--tasks": asked.tasks}
    _check(unlike | {"--streamed/--whole": streamed}, ablation)
    if ablation.ablate:
        _ablate(model, texts, windows, ablation, (data, place, source), as_json)
        return
    _check_tasks(ppl, windows, asked, tokens, data)
    if model is None:
        model = _newest()
    with running(data, place, source, as_json=as_json) as run:
        comparison = _measured(model, texts, windows, against, tokens, asked, streamed, run)
    if not run.processes.first:
        return
    if as_json:
        show_json(comparison.as_dict())
        return
    show(*evaluation(comparison))
    if tokens is not None:
        wrote(tokens)


def _measured(
    model: str,
    texts: list[str] | None,
    windows: Windows,
    against: str | None,
    tokens: Path | None,
    asked: TaskOptions,
    streamed: bool | None,
    run: Run,
) -> Comparison:
    from lrc.records.comparison import Comparison, Evaluated
    from lrc.verbs.evaluate import evaluate, evaluate_against, prepare_tasks

    comparison = Comparison(Evaluated(model, []), Evaluated(against, []) if against else None)
    score = None
    if asked.tasks is not None:
        models, named = [model, *([against] if against else [])], names("--tasks", asked.tasks) or []
        score = prepare_tasks(models, named, tasks_dir=asked.tasks_dir, streamed=streamed, run=run)
    if asked.tasks is None or texts is not None:
        how: dict[str, Any] = {
            "seq_len": windows.lengths,
            "max_windows": windows.max_windows,
            "streamed": streamed,
            "tokens": tokens,
            "run": run,
        }
        if against is None:
            comparison = Comparison(Evaluated(model, evaluate(model, texts, **how)))
        else:
            comparison = evaluate_against(model, against, texts, **how)
    return comparison if score is None else comparison.with_tasks(*score())  # last, as they take the longest


def _ablate(
    model: str | None,
    texts: list[str] | None,
    windows: Windows,
    asked: AblationOptions,
    groups: tuple[Data, Place, Source],
    as_json: bool,
) -> None:
    from lrc.report.ablation import ablation_table
    from lrc.verbs.ablate import ablate

    if model is None:  # an output, which the newest here is, cannot be
        raise UserError("--ablate needs MODEL, an original: lrc eval --ablate MODEL")
    with running(*groups, as_json=as_json, batch_size=asked.batch_size) as run, _taken_up_again():
        ablation = ablate(
            model,
            keeps=None if asked.keeps is None else fractions("--keeps", asked.keeps),
            method=asked.method,
            ppl=_one(texts),
            seq_len=windows.seq_len,
            max_windows=windows.max_windows,
            calib=asked.calib,
            fresh=asked.fresh,
            run=run,
        )
    if not run.processes.first:
        return
    if as_json:
        show_json(ablation.as_dict())
        return
    show(*ablation_table(ablation))
    wrote(*([ablation.file] if ablation.measured else []), ablation.picture)


def _newest() -> str:
    from lrc.verbs.evaluate import newest_output

    found = str(newest_output(Path.cwd()))
    if speaks():
        note(f"evaluating {found}, the newest lrc output here")
    return found


@contextmanager
def _taken_up_again() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise Paused from error


def _check(unlike: Mapping[str, object], asked: AblationOptions) -> None:
    """Refuse options that say nothing with ``--ablate``, and those that say nothing without."""
    only = {
        "--keeps": asked.keeps,
        "--method": asked.method,
        "--batch-size": asked.batch_size,
        "--calib": asked.calib,
        "--fresh": asked.fresh or None,
    }
    given = [option for option, value in (unlike if asked.ablate else only).items() if value is not None]
    if given:
        word = "with" if asked.ablate else "without"
        raise UserError(f"{' and '.join(given)}: no effect {word} --ablate; leave it out")


def _check_tasks(
    ppl: str | None, windows: Windows, asked: TaskOptions, tokens: Path | None, data: Data
) -> None:
    """Refuse options that say nothing of tasks."""
    if asked.tasks_dir is not None and asked.tasks is None:
        raise UserError("--tasks-dir has no effect without --tasks; name tasks, or leave it out")
    if asked.tasks is None or ppl is not None:
        return
    of_texts = {
        "--seq-len": windows.seq_len,
        "--context": windows.context,
        "--max-windows": windows.max_windows,
        "--tokens": tokens,
        "--data-dir": data.data_dir,
    }
    if given := [option for option, value in of_texts.items() if value is not None]:
        raise UserError(
            f"{' and '.join(given)}: no effect with --tasks alone; name a text with --ppl, or leave it out"
        )


def _one(texts: list[str] | None) -> str | None:
    if texts and len(texts) > 1:
        raise UserError(f"--ablate measures on one text, not {len(texts)}; run it again for each")
    return texts[0] if texts else None
