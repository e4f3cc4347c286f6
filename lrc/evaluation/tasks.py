"""Run tasks of lm-evaluation-harness on a loaded model, so that prompts and metrics match published figures.

EleutherAI, https://github.com/EleutherAI/lm-evaluation-harness; installed by the extra ``tasks``.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from math import hypot
from pathlib import Path
from statistics import fmean
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
_RESAMPLES = 1000  # for standard errors without a formula; the harness's 100,000 take minutes on LAMBADA

STANDARD = "standard"
# The tasks whose mean papers report, each with the metric that counts. LAMBADA belongs to the set, not to the mean.
_AVERAGED = {
    "piqa": "acc_norm",
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
    "winogrande": "acc",
    "hellaswag": "acc_norm",
}
_STANDARD = (*_AVERAGED, "lambada_openai")


@dataclass(frozen=True)
class TaskScore:
    """Hold one metric of a task, a group of tasks or the standard set.

    ``filter``: how the harness post-processed the answers. ``stderr``: standard error over documents, if the harness
    has one. ``documents``: None for a group. They are the first of ``all_documents``. ``version``: None if the task's
    metadata has none.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    shots: int | None
    documents: int | None
    all_documents: int | None
    version: str | None

    @property
    def notes(self) -> list[str]:
        """Caveats of the score."""
        if self.documents == self.all_documents:
            return []
        return [f"scores are of the first {self.documents} documents of a task; published figures are of all"]


class Tasks:
    """Hold tasks, given by names or patterns, and their data, which are loaded before any model.

    YAML files of tasks in ``folder`` precede the harness's own; paths of data in them are relative to ``folder``.
    ``standard`` names the field's set, of which ``NAME_local`` in ``folder`` replaces NAME. ``shots``: examples in a
    prompt (default: each task's own number). A task that sets 0 itself keeps it, as in the harness. ``limit``:
    documents of each task, from its start (default: all). Raises UserError if the harness is not installed, for an
    unknown task, if a task's data cannot be loaded, and if a task has too few documents for ``shots``.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path | None = None,
        *,
        shots: int | None = None,
        limit: int | None = None,
    ) -> None:
        if not names:
            raise UserError(
                f"no task is named; write such as --tasks arc_easy,hellaswag or --tasks {STANDARD}"
            )
        manager, names = _manager(names, folder)
        found, self._limit = dict.fromkeys(each for name in names for each in _named(manager, name)), limit
        with _aside(), chdir(folder) if folder else nullcontext():
            try:
                self._loaded = manager.load([*found])
            except Exception as error:  # datasets, the hub's client and the tasks' code each raise their own
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                raise UserError(
                    f"{', '.join(found)} cannot be loaded ({reason}). Without a network, use --tasks-dir with tasks "
                    "whose YAML names local files (dataset_path: json, dataset_kwargs: {data_files: ...})"
                ) from error
        for task in self._loaded["tasks"].values():
            _set_shots(task, shots)

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
                batch_size=loading.run.batch_size or _BATCH,
                # The token before an empty prompt; with BOS or EOS the harness finds it itself.
                prefix_token_id=None if marked else next(start_tokens(models[0].config), None),
            )
            with torch.random.fork_rng():
                torch.manual_seed(_SEED)
                found: Any = evaluate(
                    wrapped, self._loaded, limit=self._limit, log_samples=False, bootstrap_iters=_RESAMPLES
                )
            del wrapped
        scores = [*_scores(found)]
        return [*scores, *_standard_mean(scores)]


def _manager(names: Sequence[str], folder: Path | None) -> tuple[Any, list[str]]:
    """Return the harness's index of tasks, and the names of tasks with ``standard`` replaced by its tasks."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            "tasks need lm-evaluation-harness, which is not installed: pip install 'lrc[tasks]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is None:
        return TaskManager(), _replaced(names, ())
    if not folder.is_dir():
        raise UserError(f"--tasks-dir {folder} is not a folder; name the folder with the YAML files of tasks")
    # Skip the harness's ten thousand files if all tasks are in the folder.
    alone = TaskManager(include_path=str(folder), include_defaults=False)
    asked = _replaced(names, alone.all_subtasks)
    return alone if set(asked) <= set(alone.all_subtasks) else TaskManager(include_path=str(folder)), asked


def _replaced(names: Sequence[str], local: Iterable[str]) -> list[str]:
    """Return names with ``standard`` replaced by its tasks, each by the ``local`` one if there is one."""
    of = {_standard_name(task): task for task in sorted(local, reverse=True) if task not in _STANDARD}
    standard = [of.get(name, name) for name in _STANDARD]
    return [each for name in names for each in (standard if name == STANDARD else [name])]


def _standard_name(task: str) -> str | None:
    """Return the name in the standard set of a task, such as hellaswag for hellaswag_1k_local."""
    found = re.fullmatch(rf"({'|'.join(_STANDARD)})((_\w+)?_local)?", task)
    return found and found[1]


def _set_shots(task: Any, shots: int | None) -> None:
    own = task.get_config("num_fewshot")
    if shots is None or own == 0:
        task.set_config(key="num_fewshot", value=own or 0)
        return
    examples, apart = task.fewshot_cfg, task.has_training_docs() or task.has_validation_docs()
    if shots and not (apart or examples.split or examples.samples):
        raise UserError(
            f"--num-fewshot {shots}: {task.task_name} has no documents for examples; name a split of its data as "
            "training_split or fewshot_split in its YAML, or use --num-fewshot 0"
        )
    # One more than asked, as the harness leaves out the document that is asked.
    if shots and (most := len(task.sampler.df) - 1) < shots:
        raise UserError(f"--num-fewshot {shots}: {task.task_name} has examples for at most {most}")
    task.set_config(key="num_fewshot", value=shots)


def _named(manager: Any, name: str) -> list[str]:
    """Return the tasks that a name or pattern matches; raise UserError if there are none."""
    if found := manager.match_tasks([name]):
        return found
    near = difflib.get_close_matches(name, [STANDARD, *manager.all_tasks], n=_NEAR, cutoff=0.6)
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
                all_documents=found["n-samples"].get(task, {}).get("original"),
                version=None if version in (None, _UNVERSIONED) else str(version),
            )


def _standard_mean(scores: Iterable[TaskScore]) -> Iterator[TaskScore]:
    """Yield the mean over the standard set's tasks, if all of them were run."""
    each = {name: s for s in scores if _AVERAGED.get(name := str(_standard_name(s.task))) == s.metric}
    if each.keys() != _AVERAGED.keys():
        return
    yield TaskScore(
        task=STANDARD,
        metric=f"mean of {len(each)}",
        filter="none",
        value=fmean(s.value for s in each.values()),
        stderr=hypot(*(s.stderr or 0 for s in each.values())) / len(each),
        higher_is_better=True,
        shots=max(s.shots or 0 for s in each.values()),
        documents=None,
        all_documents=None,
        version=None,
    )


@contextmanager
def _aside() -> Iterator[None]:
    """Send the harness's progress bars to a terminal's stderr or nowhere, and its prints to stderr."""
    with ExitStack() as stack:
        if not sys.stderr.isatty():
            stack.enter_context(redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        stack.enter_context(redirect_stdout(sys.stderr))
        yield
