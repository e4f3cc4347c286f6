"""A method whose size is a pair of numbers and whose kind holds kinds is planned, budgeted, compressed and loaded."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

import lrc
from lrc.methods import methods
from lrc.modules import Factors, kinds

FAKES = Path(__file__).parents[1] / "fakes.py"
BASE = "format: 1\nmethod: two_ranks\ncalibration: {data: builtin, samples: 2, seq_len: 32}\n"

pytestmark = pytest.mark.usefixtures("without_pages")


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    found = runpy.run_path(str(FAKES))
    monkeypatch.setitem(kinds(), "sum", found["SumLinear"])
    monkeypatch.setitem(methods(), "two_ranks", found["TWO_RANKS"])
    (work / "base.yaml").write_text(BASE, encoding="utf-8")


def sizes(plan: Path) -> list[list[int]]:
    rules = yaml.safe_load(plan.read_text(encoding="utf-8"))["layers"]
    return [entry["ranks"] for rule in rules for entry in rule.values() if isinstance(entry, dict)]


@pytest.fixture
def model(shared_checkpoint: Any) -> str:
    """A model with fewer sizes to measure than the built-in ones."""
    return str(shared_checkpoint("gpt2", n_embd=64))


def test_planned_compressed_and_loaded(work: Path, succeeds: Any, model: str) -> None:
    succeeds("plan", model, "--base", "base.yaml", "--keep", "0.6", "--allocate", "energy", "-o", "q.yaml")
    found = sizes(work / "q.yaml")
    assert found
    assert all(len(size) == 2 for size in found)
    told = json.loads(succeeds("check", model, "--plan", "q.yaml", "--json").stdout)
    assert 0.59 < told["keep"] <= 0.6
    succeeds("compress", model, "--plan", "q.yaml", "--out", "out", "--device", "cpu", "--no-eval")
    report = json.loads((work / "out" / "report.json").read_text(encoding="utf-8"))
    assert all(target["size"] in found for target in report["targets"])
    stored = sum(t.nbytes for t in load_file(work / "out" / "model.safetensors").values())
    assert stored == report["after"]["bytes"] == told["after"]["bytes"]
    loaded = lrc.load(work / "out", dtype=torch.float32)
    sums: list[Any] = [module for module in loaded.modules() if getattr(module, "kind", None) == "sum"]
    assert len(sums) == len(report["targets"])
    for module in sums:
        factors = Factors("sum", module.factors, module.offset)
        x = torch.randn(3, factors.dense.shape[1])
        torch.testing.assert_close(module(x), F.linear(x, factors.dense, factors.bias), rtol=1e-4, atol=1e-4)


def test_a_budget_of_bytes(work: Path, succeeds: Any) -> None:
    whole = json.loads(succeeds("check", "tiny-llama", "--plan", "base.yaml", "--json").stdout)["before"][
        "bytes"
    ]
    budget = str(int(0.8 * whole))
    succeeds(
        "plan",
        "tiny-llama",
        "--base",
        "base.yaml",
        "--bytes",
        budget,
        "--allocate",
        "uniform",
        "-o",
        "q.yaml",
    )
    told = json.loads(succeeds("check", "tiny-llama", "--plan", "q.yaml", "--json").stdout)
    assert 0.78 * whole < told["after"]["bytes"] <= int(budget)


def test_an_allocation_in_the_plan(work: Path, succeeds: Any, model: str) -> None:
    (work / "p.yaml").write_text(f"{BASE}keep: 0.6\nallocate: energy\n", encoding="utf-8")
    succeeds("compress", model, "--plan", "p.yaml", "--out", "out", "--device", "cpu", "--no-eval")
    manifest = json.loads((work / "out" / "lrc.json").read_text(encoding="utf-8"))
    assert 0.59 < manifest["plan"]["kept"] / manifest["plan"]["whole"] <= 0.6


def test_a_wrong_size_is_told_by_the_method(work: Path, fails: Any) -> None:
    (work / "p.yaml").write_text(f"{BASE}projections: {{q: {{ranks: [8]}}}}\n", encoding="utf-8")
    assert "p.yaml:4: projections.q.ranks: [8] is no pair of ranks" in fails(
        "check", "tiny-gpt2", "--plan", "p.yaml"
    )
