"""``lrc eval``: two models by the same measure, tasks, parts alone; and mistakes told before any is measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lrc.plan.schema import Calibration
from lrc.run.versions import versions

Run = Callable[..., Result]
Fails = Callable[..., str]
TinyCheckpoint = Callable[..., Path]


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets no evaluation begin."""

    def measure(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is measured")

    monkeypatch.setattr("lrc.verbs.evaluate.evaluate_pair", measure)


def swap_tokens(folder: Path) -> None:
    """Make a tokenizer read a text as other ids: two bytes' ids change places."""
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    vocab = found["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(found), encoding="utf-8")


@pytest.mark.usefixtures("unmeasured")
def test_an_unknown_second_model_is_told_first(fails: Fails) -> None:
    message = fails("eval", "tiny-gpt2", "--against", "tiny-lama", "--ppl", "builtin")
    assert "unknown model 'tiny-lama'" in message


@pytest.mark.usefixtures("unmeasured")
def test_a_window_beyond_either_model_is_told_first(
    fails: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    short = tiny_checkpoint("llama", max_position_embeddings=32)
    argv = ["eval", tiny_checkpoint("llama"), "--against", short, "--ppl", tmp_path / "text.txt"]
    assert f"--seq-len 48 is longer than the 32 positions of {short}; use" in fails(*argv, "--seq-len", 48)


@pytest.mark.usefixtures("unmeasured")
def test_a_second_model_without_a_usable_config_is_told_first(
    fails: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    broken = tiny_checkpoint("gpt2")
    (broken / "config.json").write_text('{"model_type": "nothing"}')
    message = fails("eval", tiny_checkpoint("gpt2"), "--against", broken, "--ppl", tmp_path / "text.txt")
    assert f"{broken / 'config.json'} cannot be used" in message


@pytest.mark.parametrize(("options", "seq_len"), [([], 32), (["--seq-len", 16], 16)])
def test_both_models_have_the_window_of_the_shorter_one(
    succeeds: Run, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, options: list[object], seq_len: int
) -> None:
    longer, short = tiny_checkpoint("llama"), tiny_checkpoint("gpt2", n_positions=32)
    argv = ["eval", longer, "--against", short, "--ppl", tmp_path / "text.txt", "--device", "cpu", *options]
    found = json.loads(succeeds(*argv, "--json").stdout)
    (ours,), (theirs,) = found["perplexity"], found["against"]["perplexity"]
    assert (ours["seq_len"], theirs["seq_len"]) == (seq_len, seq_len)
    assert ours["windows"] == theirs["windows"]
    assert found["ratio"] == [pytest.approx(ours["value"] / theirs["value"])]
    assert found["ratio_of"] == ["perplexity"]
    assert found["notes"] == []


def test_other_tokens_are_compared_in_bits_per_byte(
    succeeds: Run, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    mine, other = tiny_checkpoint("llama"), tiny_checkpoint("llama", seed=1)
    swap_tokens(other)
    argv = ["eval", mine, "--against", other, "--ppl", tmp_path / "text.txt", "--device", "cpu"]
    found = json.loads(succeeds(*argv, "--json").stdout)
    (ours,), (theirs,) = found["perplexity"], found["against"]["perplexity"]
    assert found["ratio"] == [pytest.approx(ours["bits_per_byte"] / theirs["bits_per_byte"])]
    assert found["ratio"][0] != pytest.approx(ours["value"] / theirs["value"], rel=1e-3)
    assert found["ratio_of"] == ["bits_per_byte"]
    (note,) = found["notes"]
    assert "the tokenizers differ" in note
    assert found["tokens"] == [None]
    printed = " ".join(succeeds(*argv).stdout.split())
    assert f"{found['ratio'][0]:.4f}" in printed
    assert "ratio is of bits per byte" in printed


def test_tokens_of_other_tokenizers_are_refused(
    fails: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    mine, other = tiny_checkpoint("llama"), tiny_checkpoint("llama", seed=1)
    swap_tokens(other)
    argv = ["eval", mine, "--against", other, "--ppl", tmp_path / "text.txt", "--device", "cpu"]
    message = fails(*argv, "--tokens", "tokens.parquet")
    assert f"the tokenizers of {mine} and {other} differ" in message
    assert "leave --tokens out to compare bits per byte" in message


def test_against_says_what_tokens_lose(
    succeeds: Run, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    argv = ["eval", tiny_checkpoint("llama"), "--against", tiny_checkpoint("llama", seed=1)]
    argv += ["--ppl", tmp_path / "text.txt", "--device", "cpu"]
    (tokens,) = json.loads(succeeds(*argv, "--json").stdout)["tokens"]
    assert set(tokens) == {"perplexity_ratio", "kl_mean", "kl_p99", "top1_agreement"}
    printed = succeeds(*argv).stdout
    for form, name in (("{:.4f}", "perplexity_ratio"), ("{:.4g}", "kl_mean"), ("{:.2%}", "top1_agreement")):
        value, low, high = (form.format(tokens[name][key]) for key in ("value", "low", "high"))
        assert value in printed
        assert f"[{low}, {high}]" in printed
    assert "1,000 resamples of whole windows" in printed


def test_a_table_by_context_length(succeeds: Run, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    ours, theirs = tiny_checkpoint("llama"), tiny_checkpoint("llama", seed=1)
    argv = ["eval", ours, "--ppl", tmp_path / "text.txt", "--device", "cpu", "--context", "16,32,64"]
    alone = json.loads(succeeds(*argv, "--json").stdout)["perplexity"]
    found = json.loads(succeeds(*argv, "--against", theirs, "--json").stdout)
    assert [p["seq_len"] for p in alone] == [16, 32, 64]
    assert [p["windows"] for p in alone] == [
        4 * alone[2]["windows"],
        2 * alone[2]["windows"],
        alone[2]["windows"],
    ]
    assert [p["nats"] for p in found["perplexity"]] == [p["nats"] for p in alone]
    assert [p["seq_len"] for p in found["against"]["perplexity"]] == [16, 32, 64]
    printed = succeeds(*argv, "--against", theirs).stdout
    for p, against, ratio in zip(alone, found["against"]["perplexity"], found["ratio"], strict=True):
        row = next(line for line in printed.splitlines() if f"{ratio:.4f}" in line)
        assert f"{p['value']:.5g}" in row
        assert f"{against['value']:.5g}" in row
        assert str(p["seq_len"]) in row


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--context", "16,96"], "--context 16,96: 96 is longer than the 64 positions of "),
        (["--context", "16,16"], "--context 16,16: "),
        (["--context", ""], "--context '' is empty; name something, or leave it out"),
        (["--ppl", ""], "--ppl '' is empty; name something, or leave it out"),
        (["--seq-len", "1"], "see lrc eval --help"),
        (["--context", "16,many"], "--context 16,many: 'many' is not a whole number; write such as 512,1024"),
        (["--context", "16", "--seq-len", "16"], "--seq-len and --context contradict each other"),
        (
            ["--tokens", "nowhere/t.parquet"],
            "--tokens nowhere/t.parquet cannot be written: there is no folder nowhere",
        ),
        (["--tokens", "t.csv"], "--tokens t.csv writes Parquet; name the file t.parquet"),
    ],
)
def test_mistakes_in_lengths_and_files(
    fails: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, options: list[str], told: str
) -> None:
    argv = ["eval", tiny_checkpoint("llama"), "--ppl", tmp_path / "text.txt", "--device", "cpu", *options]
    assert told in fails(*argv)
    assert told in fails(*argv, "--against", tiny_checkpoint("llama"))


def test_no_data_and_no_network_says_how_to_give_a_folder(
    fails: Fails, tiny_checkpoint: TinyCheckpoint
) -> None:
    model = tiny_checkpoint("llama")
    for argv in (["eval", model, "--ppl", "wikitext2"], ["eval", model, "--against", model]):
        message = fails(*argv)
        assert "no text for wikitext2:test" in message
        assert "--data-dir" in message
        assert "LRC_DATA_DIR" in message


def test_the_same_command_gives_the_same_digits(
    succeeds: Run, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    argv = ["eval", tiny_checkpoint("llama"), "--against", tiny_checkpoint("gpt2"), "--context", "16,48"]
    argv += ["--ppl", tmp_path / "text.txt", "--device", "cpu"]

    def digits(printed: str) -> list[str]:
        return [line for line in printed.splitlines() if '"seconds"' not in line and "per_second" not in line]

    first, again = (digits(succeeds(*argv, "--json").stdout) for _ in range(2))
    assert first == again
    assert len(first) > 60


TASK = """
task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def tasks_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task on local data."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"start": "It was", "endings": ["cold", "not so"]},
        {"start": "A", "endings": ["day", "night at"]},
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "endings.yaml").write_text(TASK.format(data=folder / "data.jsonl"), encoding="utf-8")
    return folder


def test_tasks_of_both_models(
    succeeds: Run, tiny_checkpoint: TinyCheckpoint, tasks_dir: Path, tmp_path: Path
) -> None:
    argv = [
        "eval",
        tiny_checkpoint("llama"),
        "--against",
        tiny_checkpoint("llama", seed=1),
        "--device",
        "cpu",
    ]
    argv += ["--tasks", "endings", "--tasks-dir", tasks_dir]
    result = succeeds(*argv, "--json")
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found["perplexity"] == []  # no text is named
    (ours,), (theirs,) = found["tasks"], found["against"]["tasks"]
    assert (ours["task"], ours["metric"], ours["documents"]) == ("endings", "acc", 2)
    printed = succeeds(*argv, "--ppl", tmp_path / "text.txt").stdout
    assert f"{ours['value']:.4f} ± {ours['stderr']:.4f}" in printed
    assert f"{ours['value'] - theirs['value']:+.4f}" in printed
    assert "top-1 agreement" in printed


def test_perplexity_comes_before_the_tasks(
    fails: Fails, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(*_: Any) -> None:
        raise AssertionError("tasks are run")

    monkeypatch.setattr("lrc.evaluation.tasks.Tasks.evaluate", evaluate)
    argv = ["eval", "tiny-gpt2", "--device", "cpu", "--tasks", "endings", "--tasks-dir", tasks_dir, "--ppl"]
    assert "unknown text 'wikitext3'" in fails(*argv, "wikitext3")
    assert "--seq-len 4096 is longer than" in fails(*argv, tmp_path / "text.txt", "--seq-len", 4096)
    assert "--tokens t.csv writes Parquet" in fails(*argv, tmp_path / "text.txt", "--tokens", "t.csv")


@pytest.mark.usefixtures("unmeasured", "few_known_tasks")
def test_tasks_are_known_before_perplexity_is_measured(fails: Fails, tasks_dir: Path, tmp_path: Path) -> None:
    argv = ["eval", "tiny-gpt2", "--against", "tiny-gpt2", "--device", "cpu", "--ppl", tmp_path / "text.txt"]
    assert "has no task 'endigns'" in fails(*argv, "--tasks-dir", tasks_dir, "--tasks", "endigns")
    assert "--tasks '' is empty" in fails(*argv, "--tasks", "")
    told = fails(*argv, "--tasks-dir", tasks_dir, "--tasks", "endings", "--streamed")
    assert "--tasks and --streamed contradict each other" in told


@pytest.mark.parametrize(
    "options",
    [
        ["--seq-len", 16],
        ["--context", 16],
        ["--max-windows", 1],
        ["--tokens", "t.parquet"],
        ["--data-dir", "."],
    ],
)
def test_options_of_texts_with_tasks_alone(fails: Fails, options: list[object]) -> None:
    told = f"{options[0]}: no effect with --tasks alone; name a text with --ppl, or leave it out"
    assert told in fails("eval", "tiny-gpt2", "--tasks", "endings", *options)


def test_files_are_told_on_stderr(succeeds: Run, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    argv = ["eval", tiny_checkpoint("llama"), "--ppl", tmp_path / "text.txt", "--device", "cpu"]
    assert succeeds(*argv, "--tokens", "t.parquet").stderr == "wrote t.parquet\n"
    assert succeeds(*argv, "--tokens", "t.parquet", "--json").stderr == ""


def test_tasks_without_the_extra(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    message = fails("eval", "tiny-gpt2", "--tasks", "arc_easy")
    assert "lm-evaluation-harness" in message
    assert message.endswith("pip install 'lrc[tasks]'\n")


@pytest.mark.parametrize(
    "option", [["--tasks-dir", "."], ["--limit", "2"], ["--num-fewshot", "1"], ["--batch-size", "2"]]
)
def test_options_of_tasks_without_tasks(fails: Fails, option: list[str]) -> None:
    assert f"{option[0]}: no effect without --tasks" in fails("eval", "tiny-gpt2", *option)


def test_numbers_of_tasks_that_are_too_small(fails: Fails) -> None:
    argv = ["eval", "tiny-gpt2", "--tasks", "endings"]
    assert "--limit '0'" in fails(*argv, "--limit", 0)
    assert "--num-fewshot '-1'" in fails(*argv, "--num-fewshot", -1)
    assert "--batch-size '0'" in fails(*argv, "--batch-size", 0)


def test_the_first_documents_of_a_task(
    succeeds: Run, tiny_checkpoint: TinyCheckpoint, tasks_dir: Path
) -> None:
    argv = ["eval", tiny_checkpoint("llama"), "--device", "cpu", "--tasks", "endings"]
    argv += ["--tasks-dir", tasks_dir, "--limit", 1, "--batch-size", 2]
    found = json.loads(succeeds(*argv, "--json").stdout)
    assert (found["tasks"][0]["documents"], found["tasks"][0]["all_documents"]) == (1, 2)
    assert found["versions"] == versions("lm_eval", "torch", "transformers")
    printed = " ".join(succeeds(*argv).stdout.split())
    assert "first 1 of 2" in printed
    assert "first 1 documents of a task; published figures are of all" in printed
    assert f"lm_eval {found['versions']['lm_eval']}" in printed


@pytest.fixture
def ablation(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[object]:
    """``lrc eval --ablate`` of a tiny checkpoint, on four calibration blocks."""
    monkeypatch.setattr("lrc.inspection.ablation.CALIBRATION", Calibration(samples=4))
    text = tmp_path / "text.txt"
    argv = ["eval", "--ablate", tiny_checkpoint("llama"), "--ppl", text, "--calib", text, "--device", "cpu"]
    return [*argv, "--keeps", "0.5,0.25"]


def test_an_ablation_prints_and_draws(succeeds: Run, ablation: list[object], work: Path) -> None:
    found = json.loads(succeeds(*ablation, "--json").stdout)
    assert found["measured"] == len(found["results"]) == 20
    result = succeeds(*ablation, "--batch-size", 2)
    coarse = [f"warning: {each}\n" for each in found["warnings"]]
    assert (
        result.stderr == f"{''.join(coarse)}wrote {found['picture']}\n"
    )  # of results there were none to add
    printed = result.stdout
    assert "seconds: \n" not in printed
    assert f"{found['dense']['value']:.5g}" in printed
    for result in found["results"]:
        row = next(line for line in printed.splitlines() if f" {result['target']} " in line)
        assert f"{result['perplexity']:.5g} (" in row
        assert result["method"] in row
    assert "0.25 kept, 4x" in printed
    assert "0 of 20 measured in this run" in printed
    assert sorted(path.name for path in work.iterdir()) == sorted([found["file"], found["picture"]])
    assert "down" in (work / found["picture"]).read_text(encoding="utf-8")
    assert "warning: qk keeps" not in printed
    coarse = json.loads(succeeds(*ablation, "--keeps", "0.001", "--method", "a3", "--json").stdout)[
        "warnings"
    ]
    assert "qk keeps 0.25 of its weights where 0.001 is asked for; its sizes are coarse" in coarse


def test_an_interrupted_ablation_says_that_it_goes_on(
    run: Run, ablation: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lrc.verbs.ablate.losses", interrupt)
    result = run(*ablation)
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted; run the same command again to resume\n"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--against", "tiny-gpt2"], "--against: no effect with --ablate; leave it out"),
        (["--tokens", "t.parquet", "--streamed"], "--streamed/--whole and --tokens: no effect with --ablate"),
        (["--ppl", "builtin,ptb"], "--ablate measures on one text, not 2; run it again for each"),
        (["--keeps", ""], "--keeps '' is empty; name something, or leave it out"),
        (["--keeps", "half"], "--keeps half: 'half' is not a number"),
        (["--keeps", "2"], "--keeps 2: fractions are distinct, above 0 and below 1"),
        (["--method", "svt"], "--method: unknown method 'svt'; did you mean 'svd'?"),
    ],
)
def test_mistakes_in_an_ablation(fails: Fails, ablation: list[object], options: list[str], told: str) -> None:
    assert told in fails(*ablation, *options)


def test_an_ablation_names_its_model(fails: Fails) -> None:
    assert "--ablate needs MODEL, an original: lrc eval --ablate MODEL" in fails("eval", "--ablate")


@pytest.mark.parametrize("option", [["--keeps", "0.5"], ["--method", "svd"], ["--fresh"]])
def test_options_of_an_ablation_alone(fails: Fails, option: list[str]) -> None:
    assert f"{option[0]}: no effect without --ablate; leave it out" in fails("eval", "tiny-gpt2", *option)
