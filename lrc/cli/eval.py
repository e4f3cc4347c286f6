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
    names,
)
from lrc.cli.processes import processes
from lrc.cli.screen import note, progress, quiet, show, show_json


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
    max_windows: MaxWindows = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another model, measured likewise.")
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
    """Measure perplexity of MODEL, and with --against that of another model beside it."""
    quiet()
    from lrc.api import evaluate as measure
    from lrc.api import newest_output
    from lrc.evaluation.perplexity import shared_seq_len
    from lrc.hub.names import default_text, resolve_model
    from lrc.report.comparison import Comparison, Evaluated
    from lrc.report.tables import perplexities

    with processes() as ranks:
        if model is None:
            model = str(newest_output(Path.cwd()))
            if ranks.first:
                note(f"evaluating {model}, the newest lrc output here")
        texts = names(ppl) or [default_text(model)]
        models = [(model, resolve_model(model, revision=revision, allow_pickle=allow_pickle).path)]
        if against is not None:
            models.append((against, resolve_model(against, allow_pickle=allow_pickle).path))
            folders = [folder for _, folder in models]
            seq_len = shared_seq_len(folders, seq_len, trust_remote_code=trust_remote_code)
        with progress(ranks.first) as track:
            found = [
                Evaluated(
                    name,
                    measure(
                        folder,
                        texts,
                        seq_len=seq_len,
                        max_windows=max_windows,
                        data_dir=data_dir,
                        device=device,
                        dtype=dtype,
                        streamed=streamed,
                        allow_pickle=allow_pickle,
                        trust_remote_code=trust_remote_code,
                        progress=track,
                        ranks=ranks,
                    ),
                )
                for name, folder in models
            ]
        if not ranks.first:
            return
        comparison = Comparison(*found)
        if as_json:
            show_json(comparison.as_dict())
        else:
            show(*perplexities(comparison))
