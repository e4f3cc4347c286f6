"""Evaluate a model, alone or against another, by perplexity and by tasks: what ``lrc eval`` calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lrc.checkpoint.staging import MANIFEST
from lrc.errors import UserError
from lrc.estimate.room import memory_advice
from lrc.evaluation.folder import evaluate_folder, find_loading
from lrc.evaluation.pair import evaluate_pair
from lrc.evaluation.passage import choose_seq_lens
from lrc.evaluation.perplexity import Perplexity
from lrc.evaluation.tasks import Tasks, TaskScore
from lrc.evaluation.texts import evaluation_texts
from lrc.evaluation.token_file import token_file
from lrc.hub.loader import causal_config
from lrc.hub.names import resolve_model
from lrc.records.comparison import Comparison, Evaluated
from lrc.run.settings import Run
from lrc.text.source import Text, named_texts

_ADVICE = "--streamed, a shorter --seq-len, or --device cpu"


def evaluate(
    model: str | Path | None = None,
    ppl: str | Sequence[str] | None = None,
    *,
    seq_len: int | Sequence[int] | None = None,
    max_windows: int | None = None,
    streamed: bool | None = None,
    tokens: str | Path | None = None,
    run: Run = Run(),
) -> list[Perplexity]:
    """Measure the perplexity of a model, compressed or not, on each text; without ``model``, of the newest output here.

    ``ppl``: texts (default: wikitext2 and c4, or a built-in model's own), by ``lrc.evaluation.perplexity``.
    ``seq_len``: tokens of a window, or several lengths to measure on the same part of the text. ``streamed``: load one
    layer at a time (default: if the model does not fit whole). ``tokens``: a file for the loss of each token
    (``lrc.evaluation.token_file``). Raises UserError for a missing model or text.
    """
    named = None if ppl is None else named_texts(ppl)
    path = newest_output(Path.cwd()) if model is None else _folder(model, run)
    loading = find_loading(run, streamed)
    texts = evaluation_texts(str(model or path), named, run.data_folder)
    _agree(texts, run)
    with memory_advice(_ADVICE), token_file(tokens, paired=False, processes=run.processes) as keep:
        return evaluate_folder(path, texts, loading, seq_len=seq_len, max_windows=max_windows, keep=keep)


def evaluate_against(
    model: str | Path,
    against: str | Path,
    ppl: str | Sequence[str] | None = None,
    *,
    seq_len: int | Sequence[int] | None = None,
    max_windows: int | None = None,
    streamed: bool | None = None,
    tokens: str | Path | None = None,
    run: Run = Run(),
) -> Comparison:
    """Compare a model with ``against``, usually its original, on the same windows of each text.

    If both tokenize a text alike, the result compares token by token (``lrc.evaluation.pair.TokenByToken``), else by
    bits per byte. Both models are loaded at once, whole if both fit, else one layer at a time. ``run.revision`` is of
    ``model``; other arguments are those of ``lrc.evaluate``. Raises UserError for a missing model or text, and for
    ``tokens`` of models whose tokens differ.
    """
    named = None if ppl is None else named_texts(ppl)
    folders = _folder(model, run), _folder(against, replace(run, revision=None))
    configs = [causal_config(folder, trust_remote_code=run.trust_remote_code) for folder in folders]
    lengths = choose_seq_lens(zip((str(model), str(against)), configs, strict=True), seq_len)
    texts = evaluation_texts(str(model), named, run.data_folder)
    _agree(texts, run)
    loading = find_loading(run, streamed)
    with memory_advice(_ADVICE), token_file(tokens, paired=True, processes=run.processes) as keep:
        pairs = evaluate_pair(folders, texts, lengths, loading, max_windows=max_windows, keep=keep)
    of, held = (
        Evaluated(str(name), [getattr(pair, side) for pair in pairs])
        for name, side in ((model, "ours"), (against, "theirs"))
    )
    return Comparison(of, held, pairs)


def prepare_tasks(
    models: Sequence[str | Path],
    tasks: Sequence[str],
    *,
    tasks_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    streamed: bool | None = None,
    run: Run = Run(),
) -> Callable[[], list[list[TaskScore]]]:
    """Check everything that can be checked without loading a model, then return the function that runs the tasks.

    The tasks are those of lm-evaluation-harness and those in ``tasks_dir``. ``limit``: documents of each task, from its
    start. ``num_fewshot``: examples in a prompt. ``run.batch_size``: requests at once. ``run.revision`` is of the first
    model. Raises UserError if the harness, a task or its data is missing, if a model does not fit, and if several
    processes run.
    """
    if not run.processes.alone:
        raise UserError("--tasks runs in one process; start the command without a launcher")
    folders = [_folder(model, replace(run, revision=None) if i else run) for i, model in enumerate(models)]
    loading = find_loading(run, streamed)
    found = Tasks(tasks, tasks_dir, shots=num_fewshot, limit=limit)
    for folder in folders:
        found.check(folder, loading)

    def evaluate() -> list[list[TaskScore]]:
        with memory_advice("--batch-size 1, --dtype bfloat16, or --device cpu"):
            return [found.evaluate(folder, loading) for folder in folders]

    return evaluate


def _agree(texts: Sequence[Text], run: Run) -> None:
    """Raise UserError if a process has read other texts, such as one default text of two."""
    run.processes.agree({"evaluation texts": [text.sha256 for text in texts]})


def _folder(model: str | Path, run: Run) -> Path:
    return resolve_model(str(model), revision=run.revision, allow_pickle=run.allow_pickle).path


def newest_output(folder: Path) -> Path:
    """Return the newest lrc output at most three levels below ``folder``. Raises UserError if there is none."""
    manifests = [
        path
        for depth in ("", "*/", "*/*/", "*/*/*/")
        for path in folder.glob(f"{depth}{MANIFEST}")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)  # unfinished or replaced
    ]
    if not manifests:
        raise UserError(f"there is no lrc output below {folder}; name a model, or run lrc compress first")
    return max(manifests, key=lambda path: path.stat().st_mtime).parent
