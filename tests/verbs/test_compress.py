"""A compression is published before its evaluation; what stops the evaluation costs neither layers nor times."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import lrc
import lrc.compression.loop
import lrc.verbs.compress
from lrc.evaluation.domains import DOMAINS
from lrc.records.compression import Domains, Report, read_report
from lrc.verbs.verify import verify

PLAN = "{format: 1, keep: 0.5, method: a3, calibration: {samples: 4, seq_len: 32}}"
TEXT = "It was a bright cold day in April, and nobody had yet counted the words of this sentence. " * 12
REPORTS = {"report.json", "report.md", "report.html", "README.md"}  # they have the seconds of a run
LAYERS = 3


def compress(folder: Path, out: str, **given: Any) -> Report:
    given = {"plan": PLAN, "ppl": "text.txt", "run": lrc.Run(device="cpu")} | given
    with chdir(folder):
        return lrc.compress("model", out=out, calib="text.txt", **given)


def stopping(label: str) -> lrc.Run:
    """A run that Ctrl-C stops at the first step of a stage."""

    def progress(name: str, total: int) -> Callable[[int], object]:
        def advance(done: int) -> None:
            if name.startswith(label):
                raise KeyboardInterrupt

        return advance

    return lrc.Run(device="cpu", progress=progress)


@dataclass(frozen=True)
class Runs:
    """A folder with the ``model``, a whole output and ``out``, whose evaluation was stopped; and how it looked then."""

    folder: Path
    times: dict[str, Any]

    @property
    def whole(self) -> Path:
        return self.folder / "whole"


@pytest.fixture(scope="module")
def stopped(shared_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("stopped")
    shared_checkpoint("llama", num_hidden_layers=LAYERS).rename(folder / "model")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrc.verbs.compress.html_page", lambda report, others: report.sentence)
        compress(folder, "whole")
        with pytest.raises(KeyboardInterrupt):
            compress(folder, "out", run=stopping("before and after: "))
    return Runs(folder, json.loads((folder / ".out.lrc-partial" / "times.json").read_text(encoding="utf-8")))


def copied(runs: Runs, tmp_path: Path) -> Path:
    return shutil.copytree(runs.folder, tmp_path / "again", copy_function=shutil.copy2)


@pytest.fixture
def again(stopped: Runs, tmp_path: Path, without_pages: None) -> Runs:
    """A copy to go on with."""
    return Runs(copied(stopped, tmp_path), stopped.times)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of each layer that is solved."""
    layers: list[int] = []
    solve = lrc.compression.loop.solve_layer

    def count(architecture: Any, plan: Any, *rest: Any) -> Any:
        layers.append(plan.index)
        return solve(architecture, plan, *rest)

    monkeypatch.setattr(lrc.compression.loop, "solve_layer", count)
    return layers


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in REPORTS}


def test_the_checkpoint_is_published_before_the_evaluation(stopped: Runs) -> None:
    out = stopped.folder / "out"
    assert weights(out) == weights(stopped.whole)
    assert verify(out).sound
    report = read_report(out)
    assert (report.perplexity, report.pending) == ([], ["text.txt"])
    for name in REPORTS - {"report.html"}:
        assert "pending" in (out / name).read_text(encoding="utf-8")
    assert not (out / "report.html").exists()  # drawn once, with the perplexity


def test_the_same_command_goes_on_with_the_evaluation_alone(again: Runs, solved: list[int]) -> None:
    kept, labels = weights(again.folder / "out"), list[str]()
    at = {name: (again.folder / "out" / name).stat().st_mtime_ns for name in kept}

    def progress(label: str, total: int) -> Callable[[int], object]:
        labels.append(label)
        return lambda done: None

    found = compress(again.folder, "out", run=lrc.Run(device="cpu", progress=progress))
    out, whole = again.folder / "out", read_report(again.whole)
    assert solved == []
    assert [label.split()[0] for label in labels] == ["compress", "before", "before"]
    assert weights(out) == kept
    assert at == {name: (out / name).stat().st_mtime_ns for name in kept}  # not even written again
    assert read_report(out) == found
    assert found.pending == []
    assert [change.after.nats for change in found.perplexity] == [c.after.nats for c in whole.perplexity]
    assert (found.targets, found.refits, found.after) == (whole.targets, whole.refits, whole.after)
    assert not any("pending" in (out / name).read_text("utf-8") for name in REPORTS - {"report.json"})
    assert verify(out).sound
    assert not (again.folder / ".out.lrc-partial").exists()


def test_figures_are_those_of_lrc_eval(stopped: Runs) -> None:
    report, run = read_report(stopped.whole), lrc.Run(device="cpu")
    (change,) = report.perplexity
    with chdir(stopped.folder):
        (pair,) = lrc.evaluate_against("whole", "model", "text.txt", run=run).pairs
        alone = [lrc.evaluate(folder, "text.txt", run=run)[0].nats for folder in ("model", "whole")]
    assert [change.before.nats, change.after.nats] == alone
    assert change.tokens == pair.tokens
    assert change.tokens is not None
    assert change.tokens.perplexity_ratio.value == pytest.approx(change.ratio)


def test_prompts_are_answered_before_and_after(stopped: Runs) -> None:
    found = read_report(stopped.whole).answers
    assert found is not None
    assert not found.chat
    assert [each.prompt for each in found.answers] == ["Why is the sky blue?", "What is 17 + 25?"]
    assert all(each.before != each.after for each in found.answers)
    assert len(found.skipped) == 3  # the model has 64 positions
    assert all("exceed the model's 64 positions" in reason for reason in found.skipped)
    assert read_report(stopped.folder / "out").answers is None


def test_domains_and_last_words_are_measured(stopped: Runs, tmp_path: Path) -> None:
    domains = read_report(stopped.whole).domains
    assert [*domains.changes] == [name for name in DOMAINS if name != "chat"]
    for change in domains.changes.values():
        assert change.tokens is not None
        assert change.tokens.perplexity_ratio.value == pytest.approx(change.ratio)
    assert "no chat template" in domains.skipped[0]
    assert read_report(stopped.folder / "out").domains == Domains()
    folder = copied(stopped, tmp_path)
    passages = [json.dumps({"text": f"They went back to the mill {i} times to see him"}) for i in range(5)]
    (folder / "lambada_openai.jsonl").write_text("\n".join(passages), encoding="utf-8")
    report = compress(folder, "new", run=lrc.Run(device="cpu", data_dir=folder), max_windows=3)
    assert {change.before.windows for change in report.domains.changes.values()} == {3}
    assert report.last_words is not None
    assert report.last_words.passages == 3
    assert "LAMBADA, 3 of the first 3 passages" in (folder / "new" / "report.md").read_text(encoding="utf-8")


def test_a_template_that_raises_ends_no_run(stopped: Runs, tmp_path: Path) -> None:
    folder = copied(stopped, tmp_path)
    (folder / "model" / "chat_template.jinja").write_text("{{ raise_exception('no') }}", "utf-8")
    found = compress(folder, "new").answers
    assert found is not None
    assert (found.chat, found.answers, len(found.skipped)) == (True, [], 5)
    assert "TemplateError: no" in (folder / "new" / "report.md").read_text(encoding="utf-8")


def test_times_and_peaks_of_all_processes_add_up(again: Runs) -> None:
    earlier = again.times["seconds"]
    assert {"solve", "observe", "evaluate"} <= set(earlier)
    file = again.folder / ".out.lrc-partial" / "times.json"
    again.times["seconds"]["evaluate"] += 1560
    again.times["peak_bytes"]["host"] = 2**60
    file.write_text(json.dumps(again.times), encoding="utf-8")
    found = compress(again.folder, "out")
    assert found.seconds["solve"] == earlier["solve"]
    assert 1560 < earlier["evaluate"] < found.seconds["evaluate"] < 1900
    assert found.peak_bytes == {"host": 2**60}


def test_times_of_a_run_that_is_stopped_in_its_layers_count(again: Runs, solved: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(again.folder, "other", run=stopping("compress"))
    file = again.folder / ".other.lrc-partial" / "times.json"
    earlier = json.loads(file.read_text(encoding="utf-8"))["seconds"]
    steps = list[tuple[str, int, int]]()

    def progress(label: str, total: int) -> Callable[[int], object]:
        return lambda done: steps.append((label, done, total))

    found = compress(again.folder, "other", ppl=[], run=lrc.Run(device="cpu", progress=progress))
    assert solved == [0, 1, 2]
    assert found.seconds["solve"] > earlier["solve"] > 0
    assert [step for step in steps if step[0] != "gradients"] == [
        ("compress", 1, LAYERS),
        ("resume", 1, 1),
        ("compress", 1, LAYERS),
        ("compress", 1, LAYERS),
        ("write", 1, 1),
    ]


def test_without_an_evaluation_the_stopped_run_is_finished_at_once(again: Runs, solved: list[int]) -> None:
    found = compress(again.folder, "out", ppl=[])
    assert (solved, found.perplexity, found.pending) == ([], [], [])
    assert read_report(again.folder / "out") == found
    assert not (again.folder / ".out.lrc-partial").exists()


def test_an_output_that_is_gone_or_another_is_published_again(again: Runs, solved: list[int]) -> None:
    (again.folder / "out" / "lrc.json").write_text("{}", encoding="utf-8")
    compress(again.folder, "out")
    assert solved == []
    assert weights(again.folder / "out") == weights(again.whole)


def test_fresh_starts_over(again: Runs, solved: list[int]) -> None:
    compress(again.folder, "out", fresh=True, ppl=[])
    assert solved == [0, 1, 2]


def test_a_mistake_in_the_evaluation_keeps_the_run(again: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise lrc.errors.UserError("the text is gone")

    with monkeypatch.context() as patch:
        patch.setattr("lrc.verbs.cost.loaded_pair", fail)
        with pytest.raises(lrc.errors.UserError, match="the text is gone"):
            compress(again.folder, "out")
    assert read_report(again.folder / "out").pending
    assert compress(again.folder, "out").perplexity


def test_every_stage_has_a_name_and_its_steps_add_up(again: Runs) -> None:
    done, totals = dict[str, int](), dict[str, int]()

    def progress(label: str, total: int) -> Callable[[int], object]:
        totals[label], done[label] = total, 0

        def advance(steps: int) -> None:
            done[label] += steps

        return advance

    plan = PLAN.replace("method: a3", "method: a3, allocate: fisher")
    compress(again.folder, "new", plan=plan, run=lrc.Run(device="cpu", progress=progress))
    assert done == totals
    assert list(totals) == [
        "measure sizes",
        "gradients",
        "compress",
        "write",
        "before and after: load",
        "before and after: text.txt",
    ]
