"""The verbs in several processes: what they share, what they print, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from typer.testing import Result

import lrc
from lrc.evaluation.domains import domain_passages
from lrc.plan.schema import Calibration

Run = Callable[..., Result]
TinyCheckpoint = Callable[..., Path]
Together = Callable[..., list[Any]]

FILES = ("model.safetensors", "config.json", "lrc.json")
PLAN = (
    "format: 1\nkeep: 0.5\nmethod: a3\n"
    "components: {qk: {metric: attention, keep: 0.5}}\n"
    "projections: {embed: {method: whitened_svd, rank: 20}}\n"
    "calibration: {samples: 3, seq_len: 32}\n"
)


def verb(argv: Sequence[str], fault: tuple[int, str] | None = None) -> None:
    """A verb, as the command line runs it; ``fault`` is a rank and what befalls it before the last of three layers."""
    import lrc.verbs.compress
    from lrc.cli import main
    from lrc.compression.loop import Compressor
    from lrc.errors import OutOfResources

    layer = Compressor._layer

    def struck(self: Compressor, plan: Any, visit: Any) -> None:
        if fault and plan.index == 2 and self._processes.rank == fault[0]:
            if fault[1] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OutOfResources("the GPU is out of memory")
        layer(self, plan, visit)

    Compressor._layer = struck
    lrc.verbs.compress.html_page = lambda report, others: ""  # as without_pages
    sys.argv = ["lrc", *argv]
    main()


@pytest.fixture
def argv(tiny_checkpoint: TinyCheckpoint, work: Path, without_pages: None) -> list[str]:
    """``lrc compress`` of a tiny checkpoint of three layers, both attention and embedding reduced."""
    model = tiny_checkpoint("llama", num_hidden_layers=3, tie_word_embeddings=True)
    (work / "plan.yaml").write_text(PLAN, encoding="utf-8")
    text = str(work.parent / "text.txt")
    given = ["--plan", "plan.yaml", "--calib", text, "--ppl", text, "--device", "cpu", "--batch-size", "2"]
    return ["compress", str(model), *given]


def codes(ended: Sequence[Any]) -> list[int]:
    return [each.code for each in ended]


def only_the_first_spoke(ended: Sequence[Any]) -> None:
    assert all(each.out == each.err == "" for each in ended[1:])


def test_compress_and_eval(
    argv: list[str], work: Path, together: Together, succeeds: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrc.verbs.cost.domain_passages", domain_passages)
    rows = [json.dumps({"text": f"They counted {i} {'very ' * i}old mills"}) + "\n" for i in range(3)]
    (work / "lambada_openai.jsonl").write_text("".join(rows), encoding="utf-8")
    argv += ["--max-windows", "3", "--data-dir", str(work)]
    alone = json.loads(succeeds(*argv, "--out", "alone", "--json").stdout)
    for size in (2, 4):  # four are more than the blocks of calibration and the windows
        out = f"by-{size}"
        ended = together(verb, [*argv, "--out", out, "--json"], size=size, cwd=work)
        assert codes(ended) == [0] * size, ended
        only_the_first_spoke(ended)
        several = json.loads(ended[0].out)
        (before, after), (one, other) = (
            [report["perplexity"][0][key] for key in ("before", "after")] for report in (alone, several)
        )
        assert one["nats"] == pytest.approx(before["nats"], rel=1e-6)
        assert other["value"] == pytest.approx(after["value"], rel=1e-3)
        assert other["windows"] == after["windows"]
        assert other["bits_per_byte"] == pytest.approx(after["bits_per_byte"], rel=1e-3)
        assert [r["ridge"] for r in several["refits"]] == [r["ridge"] for r in alone["refits"]]
        assert several["scale"]["tokens"] == alone["scale"]["tokens"]
        assert [n["tokens"] for n in several["stream_norms"]] == [n["tokens"] for n in alone["stream_norms"]]
        assert len(alone["domains"]["changes"]) == 8  # without a template, no chat
        for name, change in alone["domains"]["changes"].items():
            nats = several["domains"]["changes"][name]["before"]["nats"]
            assert nats == pytest.approx(change["before"]["nats"], rel=1e-6)
        assert several["last_words"]["passages"] == alone["last_words"]["passages"] == 3
        assert several["last_words"]["perplexity_before"] == pytest.approx(
            alone["last_words"]["perplexity_before"], rel=1e-5
        )
        for found, expected in zip(several["targets"], alone["targets"], strict=True):
            assert found["predicted"]["error"] == pytest.approx(expected["predicted"]["error"], rel=1e-3)
            for key, value in expected["measured"].items():
                close = value if value is None else pytest.approx(value, rel=1e-2)
                assert found["measured"][key] == close, (found["target"], key)
        ours, theirs = (load_file(work / name / "model.safetensors") for name in (out, "alone"))
        kept = [name for name in theirs if name.endswith("rotary_columns")]
        assert len(kept) == 3
        assert all(ours[name].equal(theirs[name]) for name in kept)
        manifest = json.loads((work / out / "lrc.json").read_text(encoding="utf-8"))
        assert manifest["run"]["processes"] == size
    evaluation = ["eval", "by-2", "--ppl", argv[argv.index("--ppl") + 1], "--device", "cpu", "--json"]
    ended = together(verb, evaluation, cwd=work)
    assert codes(ended) == [0, 0]
    only_the_first_spoke(ended)
    (found,), (expected,) = (
        json.loads(printed)["perplexity"] for printed in (ended[0].out, succeeds(*evaluation).stdout)
    )
    for key in ("nats", "value", "bits_per_byte"):
        assert found[key] == pytest.approx(expected[key], rel=1e-6)
    for key in ("tokens", "windows", "ids_sha256"):
        assert found[key] == expected[key]


def test_eval_against_another(
    tiny_checkpoint: TinyCheckpoint, work: Path, together: Together, succeeds: Run
) -> None:
    models = ["eval", str(tiny_checkpoint("llama")), "--against", str(tiny_checkpoint("llama", seed=1))]
    argv = [*models, "--ppl", str(work.parent / "text.txt"), "--device", "cpu", "--json"]
    expected = json.loads(succeeds(*argv, "--tokens", "alone.parquet").stdout)
    ended = together(verb, [*argv, "--tokens", "several.parquet"], size=3, cwd=work)
    assert codes(ended) == [0, 0, 0], ended
    only_the_first_spoke(ended)
    found = json.loads(ended[0].out)
    for name, estimate in expected["tokens"][0].items():
        assert found["tokens"][0][name] == pytest.approx(estimate, rel=1e-5), name
    ours, theirs = (pq.read_table(work / f"{name}.parquet").to_pydict() for name in ("several", "alone"))
    for name in ("text", "seq_len", "window", "position", "token", "agree"):
        assert ours[name] == theirs[name]
    for name in ("nll", "nll_against", "kl"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5)
    refused = together(verb, [*argv, "--tokens", "here.csv"], cwd=work)
    assert codes(refused) == [2, 2]
    only_the_first_spoke(refused)


def ablation(argv: list[str]) -> None:
    """``lrc eval --ablate`` on four calibration blocks, as one of several processes runs it."""
    import lrc.inspection.ablation

    lrc.inspection.ablation.CALIBRATION = Calibration(samples=4)
    verb(argv)


def test_an_ablation(
    tiny_checkpoint: TinyCheckpoint,
    work: Path,
    together: Together,
    succeeds: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = str(work.parent / "text.txt")
    argv = [
        "eval",
        "--ablate",
        str(tiny_checkpoint("llama")),
        "--keeps",
        "0.5",
        "--ppl",
        text,
        "--calib",
        text,
    ]
    argv += ["--device", "cpu", "--json"]
    ended = together(ablation, argv, cwd=work)
    assert codes(ended) == [0, 0], ended
    only_the_first_spoke(ended)
    monkeypatch.setattr("lrc.inspection.ablation.CALIBRATION", Calibration(samples=4))
    found, expected = json.loads(ended[0].out), json.loads(succeeds(*argv, "--fresh").stdout)
    assert found["file"] == expected["file"]
    for ours, theirs in zip(found["results"], expected["results"], strict=True):
        assert ours["nats"] == pytest.approx(theirs["nats"], rel=1e-3)
        assert (ours["target"], ours["kept"]) == (theirs["target"], theirs["kept"])


def test_a_killed_process_leaves_a_run_that_goes_on_to_the_same_bytes(
    argv: list[str], work: Path, together: Together
) -> None:
    command = [*argv, "--no-eval"]
    del command[command.index("--ppl") : command.index("--ppl") + 2]
    assert codes(together(verb, [*command, "--out", "whole"], cwd=work)) == [0, 0]
    for rank in (0, 1):
        out = f"killed-{rank}"
        ended = together(verb, [*command, "--out", out], (rank, "killed"), cwd=work)
        assert ended[rank].code == -signal.SIGKILL
        assert ended[1 - rank].code == 2
        *_, told = ended[1 - rank].err.splitlines()
        assert told.startswith("error: another of the 2 processes of this run ended")
        assert told.endswith("run the same command again: a compression resumes where it stopped")
        assert not (work / out).exists()
        assert list((work / f".{out}.lrc-partial" / "parts").glob("layer-*.json"))
        assert codes(together(verb, [*command, "--out", out], cwd=work)) == [0, 0]
        for name in FILES:
            assert (work / out / name).read_bytes() == (work / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in work.iterdir()) == ["killed-0", "killed-1", "plan.yaml", "whole"]


def test_what_runs_out_in_one_is_told_by_the_first_and_another_number_does_not_take_it_up(
    argv: list[str], work: Path, together: Together, run: Run
) -> None:
    ended = together(verb, [*argv, "--out", "out"], (1, "full"), cwd=work)
    assert codes(ended) == [2, 2]
    only_the_first_spoke(ended)
    assert ended[0].err.splitlines()[-1] == "error: the GPU is out of memory"
    assert (work / ".out.lrc-partial" / "parts" / "layer-00001.json").exists()
    told = run(*argv, "--out", "out").stderr
    assert "an unfinished run of out had other settings (run); pass --fresh to start over" in told


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "plan.yaml"], "error: cannot write plan.yaml: it is a file"),
        (["--no-eval", "--json"], "error: --ppl and --no-eval contradict each other"),
        (["--plam", "x"], "error: lrc compress has no option --plam; did you mean '--plan'?"),
    ],
    ids=["output", "options", "parsing"],
)
def test_a_mistake_gives_one_message_and_exit_code_2_in_all(
    more: list[str], message: str, argv: list[str], work: Path, together: Together
) -> None:
    ended = together(verb, [*argv, *more], cwd=work)
    assert codes(ended) == [2, 2]
    only_the_first_spoke(ended)
    assert ended[0].err.startswith(message)
    assert len(ended[0].err.splitlines()) == 1
    assert [path.name for path in work.iterdir()] == ["plan.yaml"]


def test_a_folder_that_is_in_use_is_refused_in_all(argv: list[str], work: Path, together: Together) -> None:
    from lrc.checkpoint.staging import staging

    with staging(work / "out", {}, source=work / "m", fresh=False, force=False):
        ended = together(verb, [*argv, "--out", "out"], cwd=work)
    assert codes(ended) == [2, 2]
    only_the_first_spoke(ended)
    assert "error: another run is writing out" in ended[0].err


def test_plan_writes_the_plan_of_one_process(
    argv: list[str], work: Path, together: Together, succeeds: Run
) -> None:
    (work / "base.yaml").write_text(
        "format: 1\nmethod: a3\ncalibration: {samples: 4, seq_len: 32}\n", "utf-8"
    )
    made = ["plan", argv[1], "--keep", "0.6", "--base", "base.yaml", "--allocate", "energy", *argv[4:6]]
    made += ["--device", "cpu"]
    ended = together(verb, [*made, "-o", "several.yaml"], cwd=work)
    assert codes(ended) == [0, 0], ended[0].err
    only_the_first_spoke(ended)
    succeeds(*made, "-o", "alone.yaml", "--fresh")
    ours, theirs = ((work / f"{name}.yaml").read_text(encoding="utf-8") for name in ("several", "alone"))
    assert [line for line in ours.splitlines() if not line.startswith("#")] == [
        line for line in theirs.splitlines() if not line.startswith("#")
    ]


def test_what_is_not_split_is_done_by_the_first(work: Path, together: Together) -> None:
    ended = together(verb, ["list", "methods"], cwd=work)
    assert codes(ended) == [0, 0]
    only_the_first_spoke(ended)
    assert "whitened_svd" in ended[0].out


def test_torchrun_starts_it(tiny_checkpoint: TinyCheckpoint, work: Path) -> None:
    model, text = tiny_checkpoint("llama"), work.parent / "text.txt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "lrc", "eval", str(model), "--ppl", str(text), "--device", "cpu", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(lrc.__file__).parents[1])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)["perplexity"]
    assert found["windows"] > 2
