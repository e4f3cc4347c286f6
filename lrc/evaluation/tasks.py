"""Tasks of lm-evaluation-harness, which is handed the loaded model: its prompts and metrics are what people compare.

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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrc.errors import UserError
from lrc.evaluation.folder import Loading, fit, loaded
from lrc.hub.tokenizer import load_tokenizer, start_tokens

_BATCH = 8  # requests at once
_SEED = 1234  # the harness's own
_UNVERSIONED = "Yaml"  # what the harness puts where a task's metadata have none
_NEAR = 3  # names to offer for an unknown one, of thousands


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task or of a group of tasks.

    ``filter``: what the harness did to the model's answers first. ``stderr``: its standard error over documents, None
    where the harness gives none. ``documents``: None for a group. ``version``: None where the task's metadata have
    none.
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
    """Tasks by the harness's names or patterns of them, with their data, before any model is loaded.

    ``folder``: YAML files of more tasks, over those of the harness. Raises UserError where the harness is not
    installed, for a task that is not there, and where its data cannot be had.
    """

    def __init__(self, names: Sequence[str], folder: Path | None = None) -> None:
        if not names:
            raise UserError("no task is named; write such as --tasks arc_easy,hellaswag")
        manager = _manager(names, folder)
        found = dict.fromkeys(each for name in names for each in _named(manager, name))
        with _aside():
            try:
                self._loaded = manager.load([*found])
            except (
                Exception
            ) as error:  # datasets, the hub's client and the tasks' own code each have errors of their own
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                raise UserError(
                    f"{', '.join(found)} cannot be had ({reason}). Without a network give tasks whose YAML names local "
                    "files (dataset_path: json, dataset_kwargs: {data_files: ...}) by --tasks-dir"
                ) from error
        for task in self._loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)

    def check(self, folder: Path, loading: Loading) -> None:
        """Raise UserError where a folder's model does not fit whole, or a layer at a time is asked for."""
        if loading.streamed:
            raise UserError("--tasks and --streamed contradict each other: tasks run on a whole model")
        tokenizer = load_tokenizer(folder, trust_remote_code=loading.run.trust_remote_code)
        if loading.streamed is None and not fit([folder], len(tokenizer), loading):
            raise UserError(
                f"tasks run on a whole model, and {folder} does not fit on {loading.device}; try --dtype bfloat16 or "
                "another --device, or --whole to load it all the same"
            )

    def evaluate(self, folder: Path, loading: Loading) -> list[TaskScore]:
        """Scores of a folder's model, which is loaded whole and let go; examples in prompts are those of a fixed seed.

        ``check`` says whether it can be.
        """
        from lm_eval import evaluate
        from lm_eval.models import huggingface

        harness_model: Any = huggingface.HFLM  # a decorator hides what it takes

        tokenizer = load_tokenizer(folder, trust_remote_code=loading.run.trust_remote_code)
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=_SEED)
        with loaded([folder], len(tokenizer), replace(loading, streamed=False)) as models, _aside():
            # The harness's own class: it takes a loaded model, and prompts are cut by its rules.
            wrapped = harness_model(
                pretrained=cast(PreTrainedModel, models[0]),
                tokenizer=tokenizer,
                batch_size=_BATCH,
                prefix_token_id=_start(models[0].config, tokenizer),
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
            "tasks are run by lm-evaluation-harness, which is not installed: pip install 'lrc[tasks]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is None:
        return TaskManager()
    if not folder.is_dir():
        raise UserError(
            f"--tasks-dir {folder} is not a folder; give the one that holds the YAML files of tasks"
        )
    # Ten thousand files of the harness need not be read for tasks that are all here.
    alone = TaskManager(include_path=str(folder), include_defaults=False)
    return alone if set(names) <= set(alone.all_subtasks) else TaskManager(include_path=str(folder))


def _named(manager: Any, name: str) -> list[str]:
    """Tasks that a name or a pattern is of; UserError where there are none."""
    if found := manager.match_tasks([name]):
        return found
    near = difflib.get_close_matches(name, manager.all_tasks, n=_NEAR, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise UserError(f"lm-evaluation-harness has no task {name!r}; {hint}tasks of your own lie in --tasks-dir")


def _start(config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands before an empty prompt where the tokenizer has none; None where it has."""
    if tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None:
        return None
    return next(start_tokens(config), None)


def _scores(found: Mapping[str, Any]) -> Iterator[TaskScore]:
    """What the harness gives, by ``metric,filter``, a row each."""
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
    """Bars of the harness on a terminal's stderr or nowhere; what it prints is no result of ours."""
    with ExitStack() as stack:
        if not sys.stderr.isatty():
            stack.enter_context(redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        stack.enter_context(redirect_stdout(sys.stderr))
        yield
