"""``lrc eval``: measure perplexity and tasks of a model, alone or against another, and the cost of shrinking parts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from lrc.cli.options import MODEL_HELP, AsJson, Inputs, Place, Texts, calib_option, flags, option, running
from lrc.cli.screen import note, result
from lrc.errors import Paused, UserError

if TYPE_CHECKING:
    from lrc.records.comparison import Comparison
    from lrc.run.settings import Run


@dataclass(frozen=True)
class Windows(Texts):
    """The texts, and the windows that perplexity is measured on."""

    seq_len: int | None = option("Tokens in a window.", least=2, shown="2048, or the models' limit")
    context: list[int] | None = option(
        "Several window lengths: measure each on the same part of the text. --max-windows counts the longest windows."
    )
    streamed: bool | None = option(
        "Load one layer at a time, or the whole model. The perplexity is the same.",
        flag="--streamed/--whole",
        shown="whole if the model fits",
    )
    tokens: Path | None = option("Write the results of every token to this file.", metavar="FILE.parquet")


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-evaluation-harness."""

    panel: ClassVar = "Tasks"
    tasks: list[str] | None = option(
        "Tasks of lm-evaluation-harness to run, or standard: six tasks and their mean, and LAMBADA. Perplexity is then "
        "measured only with --ppl.",
        first=True,
    )
    tasks_dir: Path | None = option("Folder with YAML files that define more tasks.")
    limit: int | None = option("Documents of each task to run, from its start.", least=1, shown="all")
    num_fewshot: int | None = option("Solved examples in each prompt.", least=0, shown="the tasks'")


@dataclass(frozen=True)
class Where(Place):
    """Where the model runs, and how much at once; fields of ``lrc.Run``."""

    batch_size: int | None = option(
        "Requests of tasks, or calibration blocks of --ablate, that run at once.",
        least=1,
        shown="8 requests; blocks by their length",
    )


@dataclass(frozen=True)
class Ablation:
    """The cost of shrinking each part alone."""

    panel: ClassVar = "Ablation"
    ablate: bool = option(
        "Shrink one projection or component in all layers, measure the perplexity, repeat for each, and draw a heat "
        "map. MODEL must be an original.",
        False,
    )
    keeps: list[float] | None = option("Fractions of its weights that a part keeps.", shown="0.5,0.25,0.125")
    method: str | None = option(
        "Method that shrinks the parts. Parts that it does not support are left out.",
        metavar="NAME",
        shown="a3 for components, whitened_svd for projections",
    )
    calib: str | None = calib_option("general; builtin for the built-in models")
    fresh: bool = option("Ignore cached results and measure again.", False)


def verb(
    windows: Windows,
    tasks: Tasks,
    ablation: Ablation,
    where: Where,
    inputs: Inputs,
    model: Annotated[
        str | None,
        typer.Argument(help=MODEL_HELP, show_default="the newest lrc output below the current folder"),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Another model, usually the original, to compare with token by token."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity and tasks of MODEL, alone or against another model, or the cost of shrinking each part."""
    from lrc.report.evaluation import evaluation_tables

    given = {"against": "--against"} if against else {}
    for group in (windows, tasks, ablation, where, inputs):
        given |= {f.name: flags(f)[-1] for f in fields(group) if getattr(group, f.name) != f.default}

    def refuse(*options: str, why: str) -> None:
        if found := [flag for name, flag in given.items() if name in options]:
            raise UserError(f"{' and '.join(found)}: no effect {why}")

    if ablation.ablate:
        refused = "against", "context", "tokens", "streamed", *vars(tasks)
        refuse(*refused, why="with --ablate; leave it out")
        _ablate(model, windows, ablation, (where, inputs), as_json)
        return
    refuse("keeps", "method", "calib", "fresh", why="without --ablate; leave it out")
    if tasks.tasks is None:
        refuse(*vars(tasks), why="without --tasks; name tasks, or leave it out")
        refuse("batch_size", why="without --tasks or --ablate; leave it out")
    elif windows.ppl is None:
        why = "with --tasks alone; name a text with --ppl, or leave it out"
        refuse("seq_len", "context", "max_windows", "tokens", "data_dir", why=why)
    if model is None:
        from lrc.verbs.evaluate import newest_output

        model = str(newest_output(Path.cwd()))
        note(f"evaluating {model}, the newest lrc output here")
    with running(where, inputs, as_json=as_json) as run:
        comparison = _measure(model, against, windows, tasks, run)
    result(comparison.as_dict(), evaluation_tables(comparison), as_json, windows.tokens)


def _measure(model: str, against: str | None, windows: Windows, tasks: Tasks, run: Run) -> Comparison:
    from lrc.records.comparison import Comparison, Evaluated
    from lrc.verbs.evaluate import evaluate, evaluate_against, prepare_tasks

    if windows.seq_len is not None and windows.context is not None:
        raise UserError("--seq-len and --context contradict each other; write all lengths into --context")
    comparison, score = Comparison(Evaluated(model, []), Evaluated(against, []) if against else None), None
    if tasks.tasks is not None:
        models = [model, *([against] if against else [])]
        score = prepare_tasks(models, **vars(tasks), streamed=windows.streamed, run=run)
    if tasks.tasks is None or windows.ppl is not None:
        how: dict[str, Any] = {**vars(windows), "seq_len": windows.context or windows.seq_len, "run": run}
        del how["context"]
        if against is None:
            comparison = Comparison(Evaluated(model, evaluate(model, **how)))
        else:
            comparison = evaluate_against(model, against, **how)
    return comparison if score is None else comparison.with_tasks(*score())  # last, as they take the longest


def _ablate(
    model: str | None, windows: Windows, asked: Ablation, groups: tuple[Where, Inputs], as_json: bool
) -> None:
    from lrc.report.ablation import ablation_table
    from lrc.verbs.ablate import ablate

    if model is None:  # an output, which the newest here is, cannot be
        raise UserError("--ablate needs MODEL, an original: lrc eval --ablate MODEL")
    texts = windows.ppl or [None]
    if len(texts) > 1:
        raise UserError(f"--ablate measures on one text, not {len(texts)}; run it again for each")
    try:
        with running(*groups, as_json=as_json) as run:
            ablation = ablate(
                model,
                keeps=asked.keeps,
                method=asked.method,
                ppl=texts[0],
                seq_len=windows.seq_len,
                max_windows=windows.max_windows,
                calib=asked.calib,
                fresh=asked.fresh,
                run=run,
            )
    except KeyboardInterrupt as error:
        raise Paused from error
    files = [*([ablation.file] if ablation.measured else []), ablation.picture]
    result(ablation, ablation_table(ablation), as_json, *files)
