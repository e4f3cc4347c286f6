"""Plans are found by path or name, and every shipped one resolves against every family it is for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lrc.errors import UserError
from lrc.families import Architecture
from lrc.methods import methods
from lrc.moments import collectors
from lrc.plan.library import find_plan, shipped_plans
from lrc.plan.resolve import parse_plan, resolve
from lrc.plan.resolved import ResolvedPlan

SHIPPED = sorted(shipped_plans())
FOR_LLAMA_7B = {"llama-7b-projections"}


Shipped = Callable[[str, str], ResolvedPlan]


@pytest.fixture
def shipped(architecture: Callable[[str], Architecture]) -> Shipped:
    """Resolves a shipped plan with the real methods."""
    return lambda name, model: resolve(
        parse_plan(*find_plan(name)), architecture(model), methods(), collectors()
    )


def test_the_plans_promised_are_shipped(shipped: Shipped) -> None:
    promised = {"a3-2x", "a3-4x", "a3-8x", "a3-20pct", "svd-2x", "monarch-2x", "llama-7b-projections"}
    assert promised <= set(SHIPPED)


@pytest.mark.parametrize("model", ["gpt2", "small-gpt2", "llama-7b", "small-llama", "llama-8k"])
@pytest.mark.parametrize("name", sorted(set(SHIPPED) - FOR_LLAMA_7B))
def test_a_shipped_plan_keeps_what_it_says_of_every_family(shipped: Shipped, name: str, model: str) -> None:
    plan = shipped(name, model)
    assert isinstance(plan.plan.keep, float)
    assert plan.keep == pytest.approx(plan.plan.keep, abs=0.07 if model.startswith("small") else 0.01)
    assert plan.warnings == ()
    assert all(layer.assignments for layer in plan.layers)


def test_the_published_ranks_of_llama_7b(shipped: Shipped) -> None:
    plan = shipped("llama-7b-projections", "llama-7b")
    sizes = {a.target: a.size for a in plan.layers[31].assignments}
    assert sizes == {"q": 1024, "k": 512, "v": 1024, "gate": 2752, "up": 2752, "down": 2752}
    (warning,) = plan.warnings
    assert "rank 2048 saves nothing for o; it stays dense" in warning
    assert plan.kept == 32 * (2560 * 8192 + 4096 * 4096 + 3 * 2752 * (4096 + 11008))


def test_plans_as_published_have_no_residual_refit(shipped: Shipped) -> None:
    for name in {"svd-2x", "whitened-svd-2x", "monarch-2x", "a3-published-20pct"}:
        assert shipped(name, "small-llama").plan.refit == "none"
    assert shipped("a3-2x", "small-llama").plan.refit == "residual"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_plan_opens_with_the_command_that_runs_it(name: str) -> None:
    first = find_plan(name)[0].splitlines()[0]
    assert re.fullmatch(rf"# lrc compress \S+ --plan {name}", first)


def test_a_name_is_found_with_and_without_its_ending() -> None:
    assert find_plan("a3-2x") == find_plan("a3-2x.yaml")


def test_a_file_of_the_user_goes_over_a_shipped_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a3-2x.yaml").write_text("format: 1\n")
    monkeypatch.chdir(tmp_path)
    assert find_plan("a3-2x.yaml") == ("format: 1\n", "a3-2x.yaml")
    assert find_plan("a3-2x")[0] != "format: 1\n"


def test_an_unknown_plan_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no plan file 'a3-2y\.yaml'.*did you mean 'a3-2x'\?.*svd-2x"):
        find_plan("a3-2y.yaml")


def test_a_plan_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(b"format: \xff\xfe")
    with pytest.raises(UserError, match=r"plan\.yaml: not a text in UTF-8 \(byte 8\)"):
        find_plan(str(path))


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("format: 1\n")
    assert find_plan("~/mine.yaml") == ("format: 1\n", str(tmp_path / "mine.yaml"))
