"""``lrc eval``: perplexity of a checkpoint, compressed or not, by itself or beside another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lrc.cli.options import (
    AllowPickle,
    AsJson,
    DataDir,
    Device,
    Dtype,
    MaxWindows,
    RemoteCode,
    Revision,
    Texts,
    lengths,
    names,
)
from lrc.cli.processes import processes
from lrc.cli.screen import note, progress, quiet, show, show_json
from lrc.errors import UserError


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(help="As for compress.", show_default="the newest lrc output under this folder"),
    ] = None,
    ppl: Texts = None,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens of a window.", show_default="2048, or the limit of the shorter model"),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help="Several lengths of windows, a figure for each on the same part of the text; --max-windows counts "
            "those of the longest.",
        ),
    ] = None,
    max_windows: MaxWindows = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Another model, usually the original, beside it token by token."),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE.parquet", help="Keep the results of every token.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME]",
            help="Tasks of lm-evaluation-harness, instead of a perplexity where no --ppl names one.",
            rich_help_panel="Tasks",
        ),
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(help="Folder with YAML files of more tasks.", rich_help_panel="Tasks")
    ] = None,
    data_dir: DataDir = None,
    device: Device = None,
    dtype: Dtype = None,
    streamed: Annotated[
        bool | None,
        typer.Option(
            "--streamed/--whole",
            help="Run the model a layer at a time, or load it whole; the figure is the same.",
            show_default="whole where it fits",
        ),
    ] = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure MODEL by perplexity and tasks, and with --against what it lost of another model, token by token."""
    quiet()
    from lrc.api import evaluate as measure
    from lrc.api import newest_output
    from lrc.evaluating import evaluate_against, evaluate_tasks
    from lrc.report.comparison import Comparison, Evaluated
    from lrc.report.tables import evaluation

    with processes() as ranks:
        if context is not None and seq_len is not None:
            raise UserError("--seq-len and --context contradict each other; write all lengths into --context")
        if tasks_dir is not None and tasks is None:
            raise UserError("--tasks-dir has no effect without --tasks; name tasks, or leave it out")
        if model is None:
            model = str(newest_output(Path.cwd()))
            if ranks.first:
                note(f"evaluating {model}, the newest lrc output here")
        how = {
            "device": device,
            "dtype": dtype,
            "streamed": streamed,
            "revision": revision,
            "allow_pickle": allow_pickle,
            "trust_remote_code": trust_remote_code,
            "ranks": ranks,
        }
        comparison = Comparison(Evaluated(model, []), Evaluated(against, []) if against else None)
        scores = []
        if tasks is not None:
            models = [model, *([against] if against else [])]
            scores = evaluate_tasks(models, names(tasks) or [], tasks_dir=tasks_dir, **how)
        if tasks is None or ppl is not None:
            with progress(ranks.first) as track:
                measured = {
                    "seq_len": seq_len if context is None else lengths("--context", context),
                    "max_windows": max_windows,
                    "data_dir": data_dir,
                    "tokens": tokens,
                    "progress": track,
                }
                if against is None:
                    comparison = Comparison(Evaluated(model, measure(model, names(ppl), **measured, **how)))
                else:
                    comparison = evaluate_against(model, against, names(ppl), **measured, **how)
        comparison = comparison.with_tasks(*scores)
        if not ranks.first:
            return
        if as_json:
            show_json(comparison.as_dict())
        else:
            show(*evaluation(comparison))
