"""Tasks of lm-evaluation-harness on a loaded model: a local task, its scores worked out from the logits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lrc
import lrc.estimate.room
from lrc.errors import UserError
from lrc.evaluation.tasks import TaskScore
from lrc.hub.loader import load_tokenizer
from lrc.hub.names import resolve_model
from lrc.run.launcher import ProcessRank
from lrc.run.processes import Processes
from lrc.run.settings import Run
from lrc.verbs.evaluate import prepare_tasks

QUESTIONS = [
    ("The ship was out at", ["sea", "the of", "xylophone"], 0),
    ("She shut the door and went", ["of", "up the stairs", "seven"], 1),
    ("He had never been so", ["happy in his life", "and"], 0),
    ("It was a very", ["cold day", "cold the"], 1),
]
TASK = """
task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{right}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 2}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the YAML of a task, whose data lie beside it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    found = tmp_path / "tasks"
    found.mkdir()
    rows = [{"start": s, "endings": e, "right": r} for s, e, r in QUESTIONS]
    (found / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (found / "endings.yaml").write_text(TASK.format(data="data.jsonl"), encoding="utf-8")
    return found


def write_task(folder: Path, name: str, *, normed: bool = False, added: str = "") -> None:
    """Write a task like ``endings`` under another name; ``normed``: with acc_norm. ``added``: more lines of YAML."""
    text = TASK.format(data="data.jsonl").replace("task: endings", f"task: {name}")
    if normed:
        metric = "{metric: acc_norm, aggregation: mean, higher_is_better: true}"
        text = text.replace("metric_list: [", f"metric_list: [{metric}, ")
    (folder / f"{name}.yaml").write_text(text + added, encoding="utf-8")


def by_hand(model: Path | str, questions: int = len(QUESTIONS)) -> float:
    """The share of questions whose right ending is the likeliest, each ending run by itself."""
    path = resolve_model(str(model)).path
    loaded, tokenizer = lrc.load(path, dtype=torch.float32), load_tokenizer(path)
    right = 0
    for start, endings, which in QUESTIONS[:questions]:
        scores = []
        for ending in endings:
            prompt, ids = (
                tokenizer(text, return_tensors="pt").input_ids for text in (start, f"{start} {ending}")
            )
            with torch.no_grad():
                logs = loaded(ids).logits[0, :-1].log_softmax(-1)
            scores.append(logs.gather(1, ids[0, 1:, None])[prompt.shape[1] - 1 :].sum())
        right += int(torch.stack(scores).argmax()) == which
    return right / questions


def test_scores_are_what_the_logits_say_and_come_again(folder: Path) -> None:
    models = ["tiny-gpt2", "tiny-llama", "tiny-gpt2"]
    found = prepare_tasks(models, ["endings"], tasks_dir=folder, run=Run(device="cpu"))()
    assert found[0] == found[2]
    for model, scores in zip(models, found, strict=True):
        (score,) = scores
        assert score.value == by_hand(model)
        assert (score.task, score.metric, score.filter) == ("endings", "acc", "none")
        assert (score.documents, score.shots, score.version) == (4, 0, "2")
        assert score.higher_is_better
    assert 0 < found[0][0].value < 1


def test_a_task_without_metadata_has_no_version(folder: Path) -> None:
    path = folder / "endings.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(x for x in lines if not x.startswith("metadata:")), encoding="utf-8")
    ((score,),) = prepare_tasks(["tiny-gpt2"], ["endings"], tasks_dir=folder, run=Run(device="cpu"))()
    assert score.version is None


def test_a_compressed_model_takes_them_too(folder: Path, tiny_checkpoint, tmp_path: Path) -> None:
    text, plan = tmp_path / "text.txt", tmp_path / "plan.yaml"
    text.write_text("It was a bright cold day in April, and nobody counted. " * 20, encoding="utf-8")
    plan.write_text(
        "format: 1\nkeep: 0.5\nprojections: {embed: {method: svd, rank: 9}}\n"
        "calibration: {samples: 4, seq_len: 48}\n",
        encoding="utf-8",
    )
    source = tiny_checkpoint("llama", tie_word_embeddings=True)
    lrc.compress(source, plan, out=tmp_path / "out", calib=str(text), ppl=[], run=lrc.Run(device="cpu"))
    ((score,),) = prepare_tasks([tmp_path / "out"], ["endings"], tasks_dir=folder, run=Run(device="cpu"))()
    assert score.value == by_hand(tmp_path / "out")


def test_token_ids_beyond_the_embedding(folder: Path, tiny_checkpoint) -> None:
    score = prepare_tasks(
        [tiny_checkpoint("llama", vocab_size=90)], ["endings"], tasks_dir=folder, run=Run(device="cpu")
    )
    with pytest.raises(UserError, match="embedding has 90 rows"):
        score()


def test_the_first_documents(folder: Path) -> None:
    def first(limit: int) -> TaskScore:
        ((score,),) = prepare_tasks(
            ["tiny-gpt2"],
            ["endings"],
            tasks_dir=folder,
            limit=limit,
            run=Run(device="cpu", batch_size=1),
        )()
        return score

    assert [(first(n).documents, first(n).all_documents) for n in (3, 9)] == [(3, 4), (4, 4)]
    assert first(3).value == by_hand("tiny-gpt2", 3)
    assert "first 3 documents" in first(3).notes[0]
    assert first(9).notes == []


def test_the_standard_set_and_its_mean(folder: Path) -> None:
    for name in ("piqa", "arc_easy", "arc_challenge", "openbookqa", "hellaswag_1k"):
        write_task(folder, f"{name}_local", normed=True)
    for name in ("winogrande_local", "lambada_openai_local"):
        write_task(folder, name)
    (scores,) = prepare_tasks(["tiny-gpt2"], ["standard"], tasks_dir=folder, run=Run(device="cpu"))()
    *each, mean = scores
    assert {score.task for score in each} == {path.stem for path in folder.glob("*_local.yaml")}
    normed = [score for score in each if score.metric == "acc_norm"]
    averaged = [*normed, *(score for score in each if score.task == "winogrande_local")]
    assert (mean.task, mean.metric, len(averaged)) == ("standard", "mean of 6", 6)
    assert mean.value == pytest.approx(sum(score.value for score in averaged) / 6)
    assert mean.stderr == pytest.approx(sum((score.stderr or 0) ** 2 for score in averaged) ** 0.5 / 6)


def test_examples_in_the_prompt(folder: Path) -> None:
    def shots(name: str, asked: int) -> int | None:
        ((score,),) = prepare_tasks(
            ["tiny-gpt2"], [name], tasks_dir=folder, num_fewshot=asked, run=Run(device="cpu")
        )()
        return score.shots

    write_task(folder, "solved", added="fewshot_split: test\n")
    write_task(folder, "never", added="num_fewshot: 0\n")
    assert (shots("solved", 3), shots("endings", 0), shots("never", 2)) == (3, 0, 0)
    with pytest.raises(UserError, match="--num-fewshot 4: solved has examples for at most 3"):
        shots("solved", 4)
    with pytest.raises(UserError, match=r"--num-fewshot 1: endings has no documents .*fewshot_split"):
        shots("endings", 1)


def test_mistakes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*names: str, **options: Any) -> str:
        asked: dict[str, Any] = {"tasks_dir": folder, "run": lrc.Run(device="cpu"), **options}
        with pytest.raises(UserError) as error:
            prepare_tasks(["tiny-gpt2"], names, **asked)
        return str(error.value)

    assert "--tasks and --streamed contradict" in refused("endings", streamed=True)
    assert "--tasks runs in one process" in refused(
        "endings", run=lrc.Run(processes=Processes(ProcessRank(0, 2, 0)))
    )
    assert "no task is named" in refused()
    assert f"--tasks-dir {folder / 'none'} is not a folder" in refused("endings", tasks_dir=folder / "none")
    (folder / "data.jsonl").unlink()
    told = refused("endings")
    assert told.startswith("endings cannot be loaded (")
    assert "--tasks-dir" in told
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lm_eval.tasks", None)
        assert refused("endings").endswith("not installed: pip install 'lrc[tasks]'")


def test_a_model_that_does_not_fit_whole_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lrc.estimate.room, "free_bytes", lambda device: 100_000)
    with pytest.raises(UserError, match=r"tiny-gpt2 does not fit on cpu.*--dtype bfloat16.*--whole"):
        prepare_tasks(["tiny-gpt2"], ["endings"], tasks_dir=folder, run=Run(device="cpu"))


@pytest.mark.usefixtures("few_known_tasks")
@pytest.mark.parametrize(
    ("name", "nearest"), [("endigns", "endings"), ("standrad", "standard"), ("arc_eazy", "arc_easy")]
)
def test_an_unknown_task_is_told_with_the_nearest(folder: Path, name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"has no task '{name}'; did you mean '{nearest}'"):
        prepare_tasks(["tiny-gpt2"], [name], tasks_dir=folder, run=Run(device="cpu"))
