"""``allocate:`` in a plan: compress finds the sizes first and keeps them over a kill; check says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lrc.allocation.sizing import Sizing

pytestmark = pytest.mark.usefixtures("without_pages")

PLAN = (
    "format: 1\nkeep: 0.7\nmethod: {method}\nallocate: {name}\n"
    "calibration: {{data: ../text.txt, samples: 3, seq_len: 48}}\n"
)
RUN = ("--device", "cpu", "--no-eval")
# An MLP whose neurons are less than 0.1 % of the model each.
WIDE = {"llama": {"intermediate_size": 512}, "gpt2": {"n_inner": 512}}


@pytest.fixture(scope="module")
def models(shared_checkpoint: Any) -> dict[str, Path]:
    return {family: shared_checkpoint(family, **config) for family, config in WIDE.items()}


@pytest.fixture
def gpt2(models: dict[str, Path]) -> Path:
    return models["gpt2"]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the allocation each time that costs are found."""
    names, curves = [], Sizing.curves

    def count(self: Sizing, progress: Any) -> Any:
        names.append(self.name)
        return curves(self, progress)

    monkeypatch.setattr(Sizing, "curves", count)
    return names


def write(work: Path, name: str, method: str = "a3", more: str = "") -> None:
    (work / "p.yaml").write_text(PLAN.format(name=name, method=method) + more, encoding="utf-8")


@pytest.mark.parametrize(
    ("family", "name", "method"),
    [
        ("gpt2", "energy", "a3"),
        ("gpt2", "fisher", "a3"),
        ("llama", "importance", "svd"),
        ("llama", "sensitivity", "a3"),
    ],
)
def test_compress_takes_the_sizes_that_lrc_plan_finds(
    work: Path, succeeds: Any, models: dict[str, Path], family: str, name: str, method: str
) -> None:
    (work / "wikitext2-raw").mkdir()
    held_out = " ".join(f"{n} goats of {n * 37 % 101}." for n in range(150))
    (work / "wikitext2-raw" / "valid.txt").write_text(held_out, encoding="utf-8")
    model, data = models[family], ("--data-dir", work)
    attention = {"a3": "qk: keep-all, ov: keep-all", "svd": "q: keep-all"}[method]
    write(work, name, method, f"layers: [{{match: 0, {attention}}}]\n")
    succeeds("compress", model, "--plan", "p.yaml", "--out", "out", *RUN, *data)
    manifest = json.loads((work / "out" / "lrc.json").read_text(encoding="utf-8"))
    succeeds("plan", model, "--base", "p.yaml", "--keep", "0.7", "--device", "cpu", "-o", "q.yaml", *data)
    succeeds("compress", model, "--plan", "q.yaml", "--out", "by-hand", *RUN, *data)
    by_hand = json.loads((work / "by-hand" / "lrc.json").read_text(encoding="utf-8"))
    assert manifest["plan"]["layers"] == by_hand["plan"]["layers"]
    assert 0.7 * 0.998 <= manifest["plan"]["kept"] / manifest["plan"]["whole"] <= 0.7
    assert manifest["plan"]["plan"]["allocate"] == manifest["allocation"]["allocation"] == name
    weights = [load_file(work / folder / "model.safetensors") for folder in ("out", "by-hand")]
    assert all(weights[1][key].equal(tensor) for key, tensor in weights[0].items())


def test_a_killed_run_takes_up_the_sizes_that_it_had(
    work: Path,
    gpt2: Path,
    run: Any,
    succeeds: Any,
    fails: Any,
    found: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(work, "energy", "whitened_svd")
    arguments = ("compress", gpt2, "--plan", "p.yaml", *RUN)

    @contextmanager
    def progress(shown: bool) -> Iterator[Any]:
        def stage(label: str, total: int) -> Any:
            return kill if label == "compress" else lambda done: None

        def kill(done: int) -> None:
            raise KeyboardInterrupt

        yield stage

    with monkeypatch.context() as patch:
        patch.setattr("lrc.cli.options.progress", progress)
        assert run(*arguments, "--out", "out").exit_code == 130
    assert found == ["energy"]
    write(work, "importance", "svd")
    message = fails(*arguments, "--out", "out")
    assert "other settings (allocation, plan)" in message
    write(work, "energy", "whitened_svd")
    succeeds(*arguments, "--out", "out")
    assert found == ["energy"]
    succeeds(*arguments, "--out", "whole")
    for name in ("model.safetensors", "config.json", "lrc.json"):
        assert (work / "out" / name).read_bytes() == (work / "whole" / name).read_bytes()


def test_check_says_that_sizes_are_not_known_yet(work: Path, gpt2: Path, succeeds: Any) -> None:
    write(work, "energy")
    result = succeeds("check", gpt2, "--plan", "p.yaml", "--json")
    warning = json.loads(result.stdout)["warnings"][-1]
    assert warning.startswith("allocate energy: ")
    assert "equal fractions" in warning


@pytest.mark.parametrize(
    ("name", "method", "more", "message"),
    [
        ("importance", "a3", "", "qk under 'a3' has none"),
        ("importance", "monarch", "", "q under 'monarch' has none"),
        (
            "energy",
            "a3",
            "components: {mlp: {rank: 9}}",
            "p.yaml:6: components.mlp.rank: sets a size, but allocate",
        ),
        (
            "energy",
            "a3",
            "layers: [{match: 0-1, mlp: keep-all}]",
            "a keep of 0.7 cannot be met; the smallest that can",
        ),
    ],
)
def test_what_an_allocation_cannot_do_is_told_before_anything_is_measured(
    work: Path, gpt2: Path, fails: Any, found: list[str], name: str, method: str, more: str, message: str
) -> None:
    write(work, name, method, more)
    assert message in fails("compress", gpt2, "--plan", "p.yaml", *RUN)
    assert not found


def test_an_allocation_needs_one_keep_below_1(work: Path, gpt2: Path, fails: Any) -> None:
    for keep, message in (("[0.9, 0.6]", "shares out one fraction"), ("1", "has nothing to share out")):
        write(work, "energy")
        text = (work / "p.yaml").read_text(encoding="utf-8").replace("keep: 0.7", f"keep: {keep}")
        (work / "p.yaml").write_text(text, encoding="utf-8")
        assert message in fails("compress", gpt2, "--plan", "p.yaml", *RUN)


def test_a_keep_that_coarse_sizes_leave_unspent_is_told(
    work: Path, succeeds: Any, tiny_checkpoint: Any
) -> None:
    """Factors of layers 32 wide come in steps of 1 % of the model."""
    write(work, "energy", "monarch")
    arguments = (
        "compress",
        tiny_checkpoint("gpt2"),
        "--plan",
        "p.yaml",
        "--out",
        "out",
    )
    report = json.loads(succeeds(*arguments, "--json", *RUN).stdout)
    assert report["keep"] < 0.998 * 0.7
    assert f"keep {round(report['keep'], 4)} instead of 0.7" in " ".join(report["warnings"])
