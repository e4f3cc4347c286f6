"""The figures of docs/results.md: perplexity and standard tasks of saved models, kept and taken up again."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from queue import Queue
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("without_pages")

TASK = """
task: {name}_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: data.jsonl}}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{start}}}}"
doc_to_target: {target}
metric_list: {metrics}
"""
ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
NORMED = ("piqa", "arc_easy", "arc_challenge", "openbookqa", "hellaswag_1k")


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("results")


@pytest.fixture
def tasks_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the standard tasks, all on the same two questions."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"start": "It was", "endings": ["cold", "not"]}, {"start": "A", "endings": ["day", "night at"]}]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name in (*NORMED, "winogrande", "lambada_openai"):
        metrics, kind, target = [ACC], "multiple_choice", '0\ndoc_to_choice: "{{endings}}"'
        if name in NORMED:
            metrics = [ACC, {**ACC, "metric": "acc_norm"}]
        elif name == "lambada_openai":
            kind, target = "loglikelihood", '" {{endings[0]}}"'
            metrics = [ACC, {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]
        text = TASK.format(name=name, kind=kind, target=target, metrics=json.dumps(metrics))
        (folder / f"{name}_local.yaml").write_text(text, encoding="utf-8")
    return folder


def test_scores_are_measured_once_and_shown(
    results: ModuleType,
    tiny_checkpoint: Any,
    tasks_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April, and the clocks struck. " * 40, encoding="utf-8")
    calibration = results._calibration(str(text), "4", 2, 32, None)
    standard = results.Tasks(tasks_dir, 1, 2)
    setting = results.Setting(
        str(tiny_checkpoint("llama")), calibration, None, None, 2, [str(text)], tmp_path, standard
    )
    tasks = [results.Task("svd", {"method": "svd"}, (0.5,)), results.Task("dense", {}, (1.0,))]
    free: Queue[str | None] = Queue()
    free.put("cpu")
    made = [figure for task in tasks for figure in results._make(task, setting, free)]
    for figure in made:
        assert list(figure.scores) == ["LAMBADA perplexity", "LAMBADA accuracy", "zero-shot mean"]
    assert results._measured(made[:1]).count(" / ") == 3
    assert "first 1 documents" in results._legend([str(text)], standard)
    monkeypatch.setattr(results, "_figures", lambda *_: iter(()))
    monkeypatch.setattr(results, "_scores", None)
    assert [figure for task in tasks for figure in results._make(task, setting, free)] == made


def test_calibration_is_passed_on(results: ModuleType) -> None:
    assert results._calibration("a=2,b=1", None, 64, 2048, None) == {
        "data": "a=2,b=1",
        "seq_len": 2048,
        "gradient_samples": 64,
    }
