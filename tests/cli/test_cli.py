"""The verbs end to end: what they print, what they write, how they end."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import lrc.compression.loop
from lrc import __version__
from lrc.checkpoint.staging import staging
from lrc.cli import app, main
from lrc.records.compression import read_report
from lrc.report.compression import html_page
from lrc.verbs.evaluate import newest_output

Run = Callable[..., Result]
Fails = Callable[..., str]
TinyCheckpoint = Callable[..., Path]

PLAN = "format: 1\nkeep: 0.5\nmethod: a3\ncalibration: {samples: 8}\n"
REPORT_FILES = (
    "report.json",
    "report.md",
    "report.html",
    "README.md",
    "lrc.json",
    "config.json",
    "tokenizer.json",
)


@dataclass(frozen=True)
class Job:
    """A finished run of the main job: the folder it ran in, its output, and what it printed."""

    folder: Path
    out: Path
    result: Result

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.out / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """``lrc compress tiny-gpt2`` with a small plan, in a folder of its own."""
    folder = tmp_path_factory.mktemp("main job")
    (folder / "small.yaml").write_text(PLAN, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        argv = ["compress", "tiny-gpt2", "--plan", "small.yaml", "--max-windows", "4", "--device", "cpu"]
        result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0, result.output
    return Job(folder, folder / "tiny-gpt2-small", result)


@pytest.fixture
def there(job: Job, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The finished main job, with its folder as the current one."""
    monkeypatch.chdir(job.folder)
    monkeypatch.delenv("LRC_DATA_DIR", raising=False)
    return job


def test_compress_writes_a_whole_folder(job: Job) -> None:
    assert all((job.out / name).is_file() for name in (*REPORT_FILES, "model.safetensors"))
    assert {path.name for path in job.folder.iterdir()} == {"small.yaml", "tiny-gpt2-small"}


def test_compress_prints_the_summary(job: Job) -> None:
    printed, report = job.result.stdout, job.report
    stages = r"(gradients|compress|write|before|after|at work)\b.*"
    warnings = [line for line in job.result.stderr.splitlines() if not re.fullmatch(stages, line)]
    assert warnings == [f"warning: {warning}" for warning in report["warnings"]]
    assert "warning" not in printed
    for part in (
        "qk",
        "ov",
        "mlp",
        "nats KL",
        "predicted error",
        "KV cache, bytes per token",
        "peak memory: host",
    ):
        assert part in printed
    assert f"{report['after']['parameters']:,}" in printed
    (change,) = report["perplexity"]
    assert f"{change['before']['value']:.4g}" in printed
    assert f"{change['after']['value']:.4g}" in printed
    assert "\nwrote tiny-gpt2-small\n" in printed


def test_compress_ends_with_the_commands_that_come_next(there: Job, succeeds_here: Run) -> None:
    commands, python = there.result.stdout.rpartition("\nnext:\n")[2].split("or in Python:\n")
    first, last = commands.splitlines()
    lrc_eval, *argv = shlex.split(first)
    assert (lrc_eval, argv[:4]) == ("lrc", ["eval", "tiny-gpt2-small", "--against", "tiny-gpt2"])
    found = json.loads(succeeds_here(*argv, "--max-windows", 4, "--json").stdout)
    (change,) = there.report["perplexity"]
    assert found["perplexity"][0]["data"] == change["after"]["data"]
    assert found["ratio"] == [pytest.approx(change["after"]["value"] / change["before"]["value"], rel=1e-6)]
    names: dict[str, Any] = {}
    exec(textwrap.dedent(python), names)
    assert sum(p.numel() for p in names["model"].parameters()) == there.report["after"]["parameters"]
    quick = ["--prefill", "1x8", "--decode", "none", "--repeats", "1", "--device", "cpu", "--json"]
    lrc_bench, *argv = shlex.split(last)
    bench = json.loads(succeeds_here(*argv, *quick).stdout)
    assert (lrc_bench, bench["of"]["name"], bench["against"]["name"]) == (
        "lrc",
        "tiny-gpt2-small",
        "tiny-gpt2",
    )


def test_the_report_is_read_back_and_its_page_shows_it(job: Job) -> None:
    report = read_report(job.out)
    assert report.to_json() == (job.out / "report.json").read_text(encoding="utf-8")
    assert (report.layers, report.plan_text) == (4, PLAN)
    page = (job.out / "report.html").read_text(encoding="utf-8")
    assert page == html_page(report)
    assert report.fingerprint in page


def test_compress_costs_what_it_should(job: Job) -> None:
    (change,) = job.report["perplexity"]
    assert change["before"]["data"] == "builtin:test"
    assert change["before"]["windows"] == 4
    assert change["before"]["value"] < change["after"]["value"] < 5 * change["before"]["value"]
    assert job.report["after"]["kv_bytes_per_token"] * 2 == job.report["before"]["kv_bytes_per_token"]


def test_eval_finds_the_newest_output_and_says_which(there: Job, succeeds_here: Run) -> None:
    result = succeeds_here("eval", "--max-windows", 4, "--json")
    assert result.stderr == f"evaluating {there.out}, the newest lrc output here\n"
    found = json.loads(result.stdout)
    (measured,), (change,) = found["perplexity"], there.report["perplexity"]
    assert found["model"] == str(there.out)
    assert measured["nats"] == pytest.approx(change["after"]["nats"], rel=1e-6)


def test_eval_against_another(there: Job, succeeds_here: Run) -> None:
    argv = ["eval", there.out, "--against", "tiny-gpt2", "--max-windows", 4]
    found = json.loads(succeeds_here(*argv, "--json").stdout)
    (change,) = there.report["perplexity"]
    assert found["against"]["model"] == "tiny-gpt2"
    assert found["against"]["perplexity"][0]["value"] == pytest.approx(change["before"]["value"], rel=1e-6)
    assert found["ratio"] == [pytest.approx(change["after"]["value"] / change["before"]["value"], rel=1e-6)]
    printed = succeeds_here(*argv).stdout
    assert f"{found['ratio'][0]:.4f}" in printed
    assert f"{change['before']['value']:.5g}" in printed


def test_check_agrees_with_compress(there: Job, succeeds_here: Run) -> None:
    argv = ["check", "tiny-gpt2", "--plan", "small.yaml"]
    found, report = json.loads(succeeds_here(*argv, "--json").stdout), there.report
    for key in ("model", "plan", "keep", "before", "after"):
        assert found[key] == report[key]
    # What refits gained is known afterwards alone.
    assert found["warnings"] == [told for told in report["warnings"] if "residual refits" not in told]
    assert [row["target"] for row in found["targets"]] == ["qk", "ov", "mlp"]
    assert {row["layers"] for row in found["targets"]} == {"0-3"}
    printed = succeeds_here(*argv).stdout
    assert f"{report['after']['parameters']:,}" in printed
    assert "an estimate" in printed


def test_check_reads_no_tensor(succeeds: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("a tensor is read")

    monkeypatch.setattr("lrc.checkpoint.reader.safe_open", read)
    succeeds("check", "tiny-llama", "--plan", "a3-2x")


@pytest.fixture
def succeeds_here(there: Job) -> Run:
    def invoke(*argv: object) -> Result:
        result = CliRunner().invoke(app, [str(word) for word in argv])
        assert result.exit_code == 0, result.output
        return result

    return invoke


# Runs on small checkpoints


@pytest.fixture
def argv(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, without_pages: None) -> list[str]:
    """``lrc compress`` of a tiny checkpoint of three layers by the small plan and text."""
    model, text = tiny_checkpoint("llama", num_hidden_layers=3), tmp_path / "text.txt"
    given = ["--plan", tmp_path / "plan.yaml", "--calib", text, "--ppl", text, "--device", "cpu"]
    return ["compress", str(model), *map(str, given)]


def test_json_is_one_document_and_nothing_else(succeeds: Run, argv: list[str], work: Path) -> None:
    result = succeeds(*argv, "--out", "out", "--json")
    assert result.stdout == (work / "out" / "report.json").read_text(encoding="utf-8")
    assert json.loads(result.stdout)["out"] == "out"
    assert result.stderr == ""


def test_no_eval(succeeds: Run, argv: list[str], work: Path) -> None:
    plain = [word for i, word in enumerate(argv) if "--ppl" not in (word, argv[i - 1])]
    succeeds(*plain, "--out", "out", "--no-eval")
    assert json.loads((work / "out" / "report.json").read_text(encoding="utf-8"))["perplexity"] == []


def test_an_output_of_ours_is_replaced(succeeds: Run, argv: list[str], work: Path) -> None:
    succeeds(*argv, "--out", "out")
    (work / "out" / "stale").touch()
    succeeds(*argv, "--out", "out")
    assert not (work / "out" / "stale").exists()
    assert [path.name for path in work.iterdir()] == ["out"]


def test_force_replaces_what_is_not_ours(succeeds: Run, argv: list[str], work: Path) -> None:
    (work / "out").mkdir()
    (work / "out" / "stale").touch()
    succeeds(*argv, "--out", "out", "--force")
    assert not (work / "out" / "stale").exists()


def test_spaces_and_letters_of_other_alphabets(
    succeeds: Run, argv: list[str], work: Path, tmp_path: Path
) -> None:
    strange = tmp_path / "naïve Übung 模型"
    strange.mkdir()
    moved = [
        str(shutil.move(word, strange)) if word.startswith(str(tmp_path)) and i < 4 else word
        for i, word in enumerate(argv)
    ]
    out = strange / "klein & fein"
    result = succeeds(*moved, "--out", out)
    assert f"wrote {out}\n" in result.stdout
    assert f"lrc bench {shlex.quote(str(out))} --against" in result.stdout
    printed = succeeds("eval", out, "--ppl", tmp_path / "text.txt").stdout
    assert f"model: {out}\n" in printed


# Runs that stop half-way


@pytest.fixture
def killed(
    run: Run, argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[type[BaseException]], Result]:
    """Runs ``lrc compress`` into ``out`` and stops it once two of its three layers are finished."""

    def unseen(count: int) -> None: ...

    def run_and_kill(by: type[BaseException]) -> Result:
        @contextmanager
        def progress(shown: bool) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
            done: list[int] = []

            def advance(count: int) -> None:
                done.append(count)
                if sum(done) == 2:
                    raise by

            yield lambda label, total: advance if label == "compress" else unseen

        with monkeypatch.context() as patch:
            patch.setattr("lrc.cli.options.progress", progress)
            return run(*argv, "--out", "out")

    return run_and_kill


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


def test_an_interrupted_run_says_how_to_go_on(killed: Callable[..., Result], work: Path) -> None:
    result = killed(KeyboardInterrupt)
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted; run the same command again to resume\n"
    assert not (work / "out").exists()


@pytest.mark.parametrize("verb", [["plan", "tiny-gpt2", "--keep", "0.8"], ["eval", "tiny-gpt2"]])
def test_what_cannot_be_taken_up_says_that_it_starts_over(
    run: Run, verb: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    # In this order: a module that is first imported here should have the name as it is.
    monkeypatch.setattr("lrc.plan.job.resolve_model", interrupt)
    monkeypatch.setattr("lrc.verbs.evaluate.resolve_model", interrupt)
    result = run(*verb)
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted; the same command starts from the beginning\n"


def test_a_killed_run_goes_on_to_the_same_bytes(
    killed: Callable[..., Result], succeeds: Run, argv: list[str], work: Path, solved: list[int]
) -> None:
    killed(SystemExit)
    assert solved == [0, 1]
    succeeds(*argv, "--out", "out")
    assert solved == [0, 1, 2]
    succeeds(*argv, "--out", "whole")
    for name in ("model.safetensors", "config.json", "lrc.json"):
        assert (work / "out" / name).read_bytes() == (work / "whole" / name).read_bytes()
    assert sorted(path.name for path in work.iterdir()) == ["out", "whole"]


def test_fresh_starts_over(
    killed: Callable[..., Result], succeeds: Run, argv: list[str], solved: list[int]
) -> None:
    killed(SystemExit)
    succeeds(*argv, "--out", "out", "--fresh")
    assert solved == [0, 1, 0, 1, 2]


def test_other_settings_do_not_take_up_a_run(
    killed: Callable[..., Result],
    fails: Fails,
    succeeds: Run,
    argv: list[str],
    tmp_path: Path,
    solved: list[int],
) -> None:
    killed(SystemExit)
    plan = tmp_path / "plan.yaml"
    plan.write_text(plan.read_text(encoding="utf-8").replace("0.5", "0.75"), encoding="utf-8")
    message = fails(*argv, "--out", "out")
    assert "an unfinished run of out had other settings (plan); pass --fresh to start over" in message
    succeeds(*argv, "--out", "out", "--fresh")
    assert solved == [0, 1, 0, 1, 2]


def test_another_model_of_the_same_shapes_does_not_take_up_a_run(
    killed: Callable[..., Result], fails: Fails, argv: list[str]
) -> None:
    killed(SystemExit)
    weights = Path(argv[1]) / "model.safetensors"
    other = {name: tensor + 0.01 for name, tensor in load_file(weights).items()}
    save_file(other, weights, metadata={"format": "pt"})
    assert "an unfinished run of out had other settings (model)" in fails(*argv, "--out", "out")


def test_running_out_of_memory_in_the_evaluation_keeps_the_layers(
    run: Run, succeeds: Run, argv: list[str], work: Path, solved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("lrc.evaluation.folder.load", load)
        result = run(*argv, "--out", "out")
    assert result.exit_code == 2
    assert "try the same command with --no-eval" in result.stderr
    assert read_report(work / "out").pending
    succeeds(*argv, "--out", "out")
    assert solved == [0, 1, 2]


def test_eval_leaves_unfinished_outputs_alone(work: Path) -> None:
    for name in ("done", ".later.lrc-partial"):
        (work / name).mkdir()
        (work / name / "lrc.json").write_text("{}", encoding="utf-8")
    assert newest_output(work) == work / "done"


def test_two_runs_into_one_folder(fails: Fails, argv: list[str], work: Path) -> None:
    with staging(work / "out", {}, source=work / "m", fresh=False, force=False):
        assert "another run is writing out" in fails(*argv, "--out", "out")


def test_a_full_disk_keeps_what_is_finished(
    run: Run, succeeds: Run, argv: list[str], work: Path, solved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = lrc.checkpoint.staging.save_file

    def save_two(tensors: Any, path: Path, **kwargs: Any) -> None:
        if "00002" in path.name:
            raise OSError(28, "No space left on device")
        save(tensors, path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("lrc.checkpoint.staging.save_file", save_two)
        result = run(*argv, "--out", "out")
    assert result.exit_code == 2
    assert "the disk is full" in result.stderr
    assert "run the same command again" in result.stderr
    succeeds(*argv, "--out", "out")
    assert solved == [0, 1, 2, 2]


def test_a_failure_of_ours_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("lrc.plan.library.find_plan", broken)
    result = run("check", "tiny-gpt2", "--plan", "a3-2x")
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize(
    ("argv", "code"), [(["--version"], 0), (["check", "tiny-gtp2", "--plan", "a3-2x"], 2), (["chek"], 2)]
)
def test_exit_codes(
    argv: list[str],
    code: int,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["lrc", *argv])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == code
    assert bool(capsys.readouterr().err) == (code == 2)


# What needs no model


def test_list_names_everything(succeeds: Run) -> None:
    found = json.loads(succeeds("list", "--json").stdout)
    names = {group: {item["name"] for item in items} for group, items in found.items()}
    assert {"a3", "svd", "whitened_svd", "two_sided_svd", "monarch"} <= names["methods"]
    assert {"gpt2", "llama", "qwen3", "gemma3_text"} <= names["families"]
    assert {"low_rank", "monarch"} <= names["kinds"]
    assert {"a3-2x", "svd-2x", "monarch-2x"} <= names["plans"]
    assert {"wikitext2", "c4", "ptb", "pile", "builtin"} <= names["data"]
    assert {"tiny-gpt2", "tiny-llama", "llama-7b"} <= names["models"]
    assert all(item["summary"] for items in found.values() for item in items)
    papers = {item["name"]: item["source"] for item in found["methods"]}
    assert "arXiv:2505.12942" in papers["a3"]


@pytest.mark.parametrize("group", ["methods", "families", "kinds", "plans", "data", "models"])
def test_list_one_group(succeeds: Run, group: str) -> None:
    found = json.loads(succeeds("list", group, "--json").stdout)
    printed = succeeds("list", group).stdout
    assert list(found) == [group]
    assert all(item["name"] in printed for item in found[group])


def test_list_without_a_group_is_a_short_page(succeeds: Run) -> None:
    found = json.loads(succeeds("list", "--json").stdout)
    printed = succeeds("list").stdout
    assert all(item["name"] in " ".join(printed.split()) for items in found.values() for item in items)
    assert len(printed.splitlines()) <= 24


def test_version(succeeds: Run) -> None:
    assert succeeds("--version").stdout == f"lrc {__version__}\n"


@pytest.mark.parametrize("argv", [["--help"], ["compress", "--help"], ["--version"]], ids=" ".join)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    script = (
        "import atexit, os, sys\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'huggingface_hub'}\n"
        "atexit.register(lambda: print(heavy & set(sys.modules) or 'light', file=sys.stderr))\n"
        "before = dict(os.environ)\n"
        "from lrc.cli import main\n"
        "assert before == dict(os.environ)\n"
        f"sys.argv = ['lrc', *{argv!r}]\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script]
    root = str(Path(lrc.__file__).parents[1])
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert result.stderr.strip() == "light"
    assert result.stdout


@pytest.mark.parametrize(
    ("verb", "default"),
    [
        ("compress", "./MODEL-PLAN"),
        ("eval", "the newest lrc output below the current folder"),
        ("plan", "seven from 0.95 to 0.2"),
        ("list", "the names in every group"),
    ],
)
def test_help_says_the_defaults_that_are_worked_out(succeeds: Run, verb: str, default: str) -> None:
    printed = succeeds(verb, "--help").stdout
    assert f"[default: ({default})]" in " ".join(printed.replace("│", " ").split())


@pytest.mark.parametrize(
    ("verb", "first"),
    [
        ("compress", {"--plan", "--keep", "--set", "--out", "--ppl"}),
        ("eval", {"--ppl", "--tasks", "--against"}),
        ("plan", {"--keep", "--bytes", "--kv-cache", "--base", "--out"}),
        ("bench", {"--against", "--prefill", "--decode", "--out"}),
        ("inspect", {"--against", "--keeps", "--out"}),
        ("check", {"--plan", "--keep", "--set"}),
        ("compare", {"--out"}),
        ("verify", {"--trust-remote-code"}),
        ("list", set()),
    ],
)
def test_help_shows_few_options_first_and_the_rest_in_titled_panels(
    succeeds: Run, verb: str, first: set[str]
) -> None:
    panels: dict[str, set[str]] = {}
    for line in succeeds(verb, "--help").stdout.splitlines():
        if begun := re.match(r"╭─ (.+?) ─", line):
            options = panels.setdefault(begun[1], set())
        elif option := re.match(r"│ +(--[a-z-]+)", line):
            options.add(option[1])
    assert panels.pop("Arguments") == set()
    assert next(iter(panels)) == "Options"
    assert panels.pop("Options") == first | {"--json", "--help"}
    assert all(panels.values())
    if verb in ("compress", "plan", "eval", "inspect"):
        assert {"--device", "--dtype"} <= panels["Where it runs"]
        assert {"--revision", "--data-dir"} <= panels["Where the model and the texts come from"]


@pytest.mark.parametrize("verb", [(), ("compress",), ("eval",), ("bench",), ("list",)], ids=" ".join)
def test_help_shows_no_type_of_a_flag(succeeds: Run, verb: tuple[str, ...]) -> None:
    printed = succeeds(*verb, "--help").stdout
    assert "--help" in printed
    assert not re.search("bool|BOOLEAN", printed)


def test_help_of_compress_is_short(succeeds: Run) -> None:
    assert len(succeeds("compress", "--help").stdout.splitlines()) < 107  # without panels


def test_messages_are_left_whole(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "a folder with a long name" / ("x" * 200)
    assert f"there is no folder {path}" in run("check", path, "--plan", "a3-2x").stderr
