"""Run tasks of lm-evaluation-harness on a loaded model, so that prompts and metrics match published figures.

EleutherAI, https://github.com/EleutherAI/lm-evaluation-harness; installed by the extra ``tasks``.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from lrc.errors import UserError
from lrc.evaluation.folder import Loading, fit, loaded
from lrc.hub.loader import load_tokenizer, start_tokens
from lrc.text.blocks import check_ids

_BATCH = 8  # requests at once
_SEED = 1234  # the harness's own
_UNVERSIONED = "Yaml"  # the harness's version of a task whose metadata has none
_NEAR = 3  # names to suggest, of thousands


@dataclass(frozen=True)
class TaskScore:
    """Hold one metric of a task or a group of tasks.

    ``filter``: how the harness post-processed the answers. ``stderr``: standard error over documents, if the harness
    has one. ``documents``: None for a group. ``version``: None if the task's metadata has none.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    shots: int | None
    documents: int | None
    version: str | None


class Tasks:
    """Hold tasks, given by names or patterns, and their data, which are loaded before any model.

    YAML files of tasks in ``folder`` precede the harness's own. Raises UserError if the harness is not installed, for
    an unknown task, and if a task's data cannot be loaded.
    """

    def __init__(self, names: Sequence[str], folder: Path | None = None) -> None:
        if not names:
            raise UserError("no task is named; write such as --tasks arc_easy,hellaswag")
        manager = _manager(names, folder)
        found = dict.fromkeys(each for name in names for each in _named(manager, name))
        with _aside():
            try:
                self._loaded = manager.load([*found])
            except Exception as error:  # datasets, the hub's client and the tasks' code each raise their own
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                raise UserError(
                    f"{', '.join(found)} cannot be loaded ({reason}). Without a network, use --tasks-dir with tasks "
                    "whose YAML names local files (dataset_path: json, dataset_kwargs: {data_files: ...})"
                ) from error
        for task in self._loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)

    def check(self, folder: Path, loading: Loading) -> None:
        """Raise UserError if a folder's model does not fit whole, or ``loading`` streams it layer by layer."""
        if loading.streamed:
            raise UserError("--tasks and --streamed contradict each other: tasks need the whole model")
        tokenizer = load_tokenizer(folder, trust_remote_code=loading.run.trust_remote_code)
        if loading.streamed is None and not fit([folder], len(tokenizer), loading):
            raise UserError(
                f"tasks need the whole model, and {folder} does not fit on {loading.device}; try --dtype bfloat16 or "
                "another --device, or --whole to load it anyway"
            )

    def evaluate(self, folder: Path, loading: Loading) -> list[TaskScore]:
        """Load a folder's model whole and score it, with few-shot examples of a fixed seed; call ``check`` first."""
        from lm_eval import evaluate
        from lm_eval.models import huggingface

        harness_model: Any = huggingface.HFLM  # a decorator hides its signature
        tokenizer = load_tokenizer(folder, trust_remote_code=loading.run.trust_remote_code)
        marked = tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=_SEED)
        with loaded([folder], len(tokenizer), replace(loading, streamed=False)) as models, _aside():
            rows = models[0].config.get_text_config().vocab_size
            # The harness tokenizes documents by itself.
            cast(PreTrainedModel, models[0]).get_input_embeddings().register_forward_pre_hook(
                lambda module, ids: check_ids(tokenizer, ids[0], rows)
            )
            # The harness's class truncates prompts by its own rules.
            wrapped = harness_model(
                pretrained=cast(PreTrainedModel, models[0]),
                tokenizer=tokenizer,
                batch_size=_BATCH,
                # The token before an empty prompt; with BOS or EOS the harness finds it itself.
                prefix_token_id=None if marked else next(start_tokens(models[0].config), None),
            )
            with torch.random.fork_rng():
                torch.manual_seed(_SEED)
                found: Any = evaluate(wrapped, self._loaded, log_samples=False)
            del wrapped
        return [*_scores(found)]


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            "tasks need lm-evaluation-harness, which is not installed: pip install 'lrc[tasks]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is None:
        return TaskManager()
    if not folder.is_dir():
        raise UserError(f"--tasks-dir {folder} is not a folder; name the folder with the YAML files of tasks")
    # Skip the harness's ten thousand files if all tasks are in the folder.
    alone = TaskManager(include_path=str(folder), include_defaults=False)
    return alone if set(names) <= set(alone.all_subtasks) else TaskManager(include_path=str(folder))


def _named(manager: Any, name: str) -> list[str]:
    """Return the tasks that a name or pattern matches; raise UserError if there are none."""
    if found := manager.match_tasks([name]):
        return found
    near = difflib.get_close_matches(name, manager.all_tasks, n=_NEAR, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise UserError(
        f"lm-evaluation-harness has no task {name!r}; {hint}name a folder of your tasks with --tasks-dir"
    )


def _scores(found: Mapping[str, Any]) -> Iterator[TaskScore]:
    """Yield the harness's results, which are keyed by ``metric,filter``, one by one."""
    for task, results in found["results"].items():
        for key, value in results.items():
            metric, comma, answers = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = results.get(f"{metric}_stderr,{answers}")
            version = found["versions"].get(task)
            yield TaskScore(
                task=task,
                metric=metric,
                filter=answers,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
                shots=found["n-shot"].get(task),
                documents=found["n-samples"].get(task, {}).get("effective"),
                version=None if version in (None, _UNVERSIONED) else str(version),
            )


@contextmanager
def _aside() -> Iterator[None]:
    """Send the harness's progress bars to a terminal's stderr or nowhere, and its prints to stderr."""
    with ExitStack() as stack:
        if not sys.stderr.isatty():
            stack.enter_context(redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        stack.enter_context(redirect_stdout(sys.stderr))
        yield
