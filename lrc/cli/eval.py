"""``lrc eval``: perplexity and tasks of a checkpoint, by itself or beside another, and what shrinking parts costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    fractions,
    lengths,
    names,
)
from lrc.cli.processes import processes
from lrc.cli.screen import note, progress, quiet, show, show_json, wrote
from lrc.errors import Paused, UserError


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(help="As for compress.", show_default="the newest lrc output under this folder"),
    ] = None,
    ppl: Texts = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens of a window.", show_default="2048, or the limit of the shorter model"
        ),
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
    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate",
            help="Perplexity with each projection and component of MODEL, an original, alone shrunk in all layers, and "
            "a heat map.",
            rich_help_panel="Ablation",
        ),
    ] = False,
    keeps: Annotated[
        str | None,
        typer.Option(
            metavar="F[,F...]",
            help="Fractions of its weights that a target keeps.",
            show_default="0.5,0.25,0.125",
            rich_help_panel="Ablation",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What shrinks all that it can.",
            show_default="a3 components, whitened_svd projections",
            rich_help_panel="Ablation",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Calibration blocks at once.",
            show_default="by their length",
            rich_help_panel="Ablation",
        ),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="DATA[=W],...",
            help="Calibration texts, as for compress.",
            show_default="wikitext2; builtin for the built-in models",
            rich_help_panel="Ablation",
        ),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Measure anew, whatever results there are here.", rich_help_panel="Ablation"
        ),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME]",
            help="Tasks of lm-evaluation-harness, instead of a perplexity where no --ppl names one.",
            rich_help_panel="Tasks",
        ),
    ] = None,
    tasks_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder with YAML files of more tasks.", rich_help_panel="Tasks"),
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
    """Measure MODEL by perplexity and tasks; what it lost of another model; or what shrinking each part alone costs."""
    quiet()
    from lrc.records.comparison import Comparison, Evaluated
    from lrc.report.ablation import ablation_table
    from lrc.report.tables import evaluation
    from lrc.verbs.ablate import ablate as measure_alone
    from lrc.verbs.evaluate import evaluate as measure
    from lrc.verbs.evaluate import evaluate_against, newest_output, prepare_tasks

    with processes() as ranks:
        if context is not None and seq_len is not None:
            raise UserError("--seq-len and --context contradict each other; write all lengths into --context")
        if tasks_dir is not None and tasks is None:
            raise UserError("--tasks-dir has no effect without --tasks; name tasks, or leave it out")
        unlike = {"--against": against, "--context": context, "--tokens": tokens, "--tasks": tasks}
        only = {"--keeps": keeps, "--method": method, "--batch-size": batch_size, "--calib": calib}
        only |= {"--fresh": fresh or None}
        _check(ablate, unlike | {"--streamed/--whole": streamed}, only)
        if tasks is not None and ppl is None:
            texts = {
                "--seq-len": seq_len,
                "--context": context,
                "--max-windows": max_windows,
                "--tokens": tokens,
                "--data-dir": data_dir,
            }
            if given := [option for option, value in texts.items() if value is not None]:
                raise UserError(
                    f"{' and '.join(given)}: no effect with --tasks alone; name a text with --ppl, or leave it out"
                )
        if ablate and model is None:  # an output, which the newest here is, cannot be
            raise UserError("--ablate needs MODEL, an original: lrc eval --ablate MODEL")
        if model is None:
            model = str(newest_output(Path.cwd()))
            if ranks.first:
                note(f"evaluating {model}, the newest lrc output here")
        how = {
            "device": device,
            "dtype": dtype,
            "revision": revision,
            "allow_pickle": allow_pickle,
            "trust_remote_code": trust_remote_code,
            "ranks": ranks,
        }
        if ablate:
            with progress(ranks.first) as track, _taken_up_again():
                ablation = measure_alone(
                    model,
                    keeps=None if keeps is None else fractions("--keeps", keeps),
                    method=method,
                    ppl=_one(names("--ppl", ppl)),
                    seq_len=seq_len,
                    max_windows=max_windows,
                    calib=calib,
                    data_dir=data_dir,
                    batch_size=batch_size,
                    fresh=fresh,
                    progress=track,
                    **how,
                )
            if ranks.first and as_json:
                show_json(ablation.as_dict())
            elif ranks.first:
                show(*ablation_table(ablation))
                wrote(*([ablation.file] if ablation.measured else []), ablation.picture)
            return
        how["streamed"] = streamed
        comparison = Comparison(Evaluated(model, []), Evaluated(against, []) if against else None)
        score = None
        if tasks is not None:
            models = [model, *([against] if against else [])]
            score = prepare_tasks(models, names("--tasks", tasks) or [], tasks_dir=tasks_dir, **how)
        if tasks is None or ppl is not None:
            specs = names("--ppl", ppl)
            with progress(ranks.first) as track:
                measured = {
                    "seq_len": seq_len if context is None else lengths("--context", context),
                    "max_windows": max_windows,
                    "data_dir": data_dir,
                    "tokens": tokens,
                    "progress": track,
                }
                if against is None:
                    comparison = Comparison(Evaluated(model, measure(model, specs, **measured, **how)))
                else:
                    comparison = evaluate_against(model, against, specs, **measured, **how)
        if score is not None:  # last, as they take the longest
            comparison = comparison.with_tasks(*score())
        if not ranks.first:
            return
        if as_json:
            show_json(comparison.as_dict())
            return
        show(*evaluation(comparison))
        if tokens is not None:
            wrote(tokens)


@contextmanager
def _taken_up_again() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise Paused from error


def _check(ablate: bool, unlike: Mapping[str, object], only: Mapping[str, object]) -> None:
    """Refuse options that say nothing with ``--ablate``, and those that say nothing without."""
    given = [option for option, value in (unlike if ablate else only).items() if value is not None]
    if given:
        word = "with" if ablate else "without"
        raise UserError(f"{' and '.join(given)}: no effect {word} --ablate; leave it out")


def _one(texts: list[str] | None) -> str | None:
    if texts and len(texts) > 1:
        raise UserError(f"--ablate measures on one text, not {len(texts)}; run it again for each")
    return texts[0] if texts else None
