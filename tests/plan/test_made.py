"""Plans made in Python, written in one string, and changed by single entries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrc.errors import UserError
from lrc.families import Architecture
from lrc.methods import methods
from lrc.moments import collectors
from lrc.plan.document import read_value
from lrc.plan.library import find_draft, read_draft
from lrc.plan.resolve import Draft, resolve
from lrc.plan.resolved import ResolvedPlan
from lrc.plan.schema import Calibration, Plan

TEXT = """\
# lrc compress tiny-llama --plan mine.yaml
format: 1
keep: 0.8
components: {mlp: {keep: 0.5, select: obs}}
layers:
  - {match: 0, keep: 0.9}
calibration: {samples: 16}
"""
SAME = Plan(
    keep=0.8,
    components={"mlp": {"keep": 0.5, "select": "obs"}},  # type: ignore[arg-type]
    layers=[{"match": "0", "keep": 0.9}],  # type: ignore[arg-type]
    calibration=Calibration(samples=16),
)

Resolved = Callable[[Draft], ResolvedPlan]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def resolved(architecture: Callable[[str], Architecture]) -> Resolved:
    """Works a plan out for a small model with the real methods."""
    return lambda draft: resolve(draft, architecture("small-gpt2"), methods(), collectors())


def test_the_same_plan_in_python_in_one_string_and_in_a_file(mine: Path, resolved: Resolved) -> None:
    inline = (
        "{keep: 0.8, components: {mlp: {keep: 0.5, select: obs}}, layers: [{match: 0, keep: 0.9}], "
        "calibration: {samples: 16}}"
    )
    plans = [resolved(read_draft(plan)).as_dict() for plan in (mine, SAME, inline)]
    assert plans[0] == plans[1] == plans[2]


def test_the_text_of_a_plan_made_in_python_reads_as_the_same_plan(tmp_path: Path, resolved: Resolved) -> None:
    draft = read_draft(SAME)
    (tmp_path / "again.yaml").write_text(draft.text, encoding="utf-8")
    again = resolved(read_draft(tmp_path / "again.yaml"))
    assert again.as_dict() == resolved(draft).as_dict()
    assert draft.text.startswith("format: 1\n")


def test_names_of_plans_without_a_file_say_what_they_keep() -> None:
    assert [read_draft(plan).stem for plan in (Plan(keep=0.8), "{keep: [0.9, 0.6], method: svd}")] == [
        "a3-0.8",
        "svd-0.9-0.6",
    ]
    assert find_draft(None, 0.8, None).name == "a3-0.8"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"keep": 1.5}, "lrc.Plan: keep: 1.5 is outside (0, 1]; the nearest is 1"),
        ({"kep": 0.5}, "lrc.Plan: kep: unknown key; did you mean 'keep'?"),
        (
            {"calibration": {"sample": 4}},
            "lrc.Plan: calibration.sample: unknown key; did you mean 'samples'?",
        ),
        (
            {"allocate": "fishr", "keep": 0},
            "lrc.Plan: allocate: 'fishr' is not known; did you mean 'fisher'?",
        ),
    ],
)
def test_a_mistake_in_python_is_told_as_in_a_file(values: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        Plan(**values)
    assert told in str(error.value)
    if "keep" in values and "allocate" in values:
        assert "lrc.Plan: keep: 0 is outside (0, 1]" in str(error.value)  # all mistakes at once


def test_a_mistake_that_the_model_shows_names_the_entry(resolved: Resolved) -> None:
    plan = Plan(components={"mlp": {"width": 100_000}}, projections={"fc_in": {"rank": 4}})  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"lrc\.Plan: projections\.fc_in: components\.mlp is for the same weights"
    ):
        resolved(read_draft(plan))


@pytest.mark.parametrize("format_", ["keep: 0.5\n", "format: 2\n"])
def test_a_file_must_name_its_format(tmp_path: Path, resolved: Resolved, format_: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(format_, encoding="utf-8")
    with pytest.raises(UserError, match=r"p\.yaml:1: format"):
        resolved(read_draft(path))


def test_entries_are_replaced_and_the_rest_stays(mine: Path, resolved: Resolved) -> None:
    changes = {
        "calibration.samples": 4,
        "components.mlp.select": "score",
        "layers.0.keep": 0.7,
        "components.qk": "keep-all",
    }
    draft = read_draft(mine, 0.6, changes)
    plan, mlp = resolved(draft).plan, draft.plan.components.mlp
    assert (plan.keep, plan.calibration.samples) == (0.6, 4)
    assert mlp is not None
    assert (mlp.keep, mlp.own) == (0.5, {"select": "score"})
    assert [rule and rule.keep for rule in plan.layers] == [0.7]
    assert plan.components.qk is not None
    assert plan.components.qk.keep == 1
    assert draft.text.startswith(TEXT)
    assert draft.text.endswith("--set components.qk=keep-all --keep 0.6\n")


def test_a_changed_plan_names_its_own_output(mine: Path) -> None:
    changed: list[tuple[float | None, dict[str, Any]]] = [
        (None, {}),
        (0.6, {}),
        (0.7, {}),
        (None, {"allocate": "fisher"}),
        (None, {"calibration.samples": 4}),
    ]
    stems = {read_draft(mine, *each).stem for each in changed}
    assert stems == {
        "mine",
        "mine-0.6",
        "mine-0.7",
        "mine-allocate-fisher",
        "mine-calibration.samples-4",
    }


def test_a_keep_of_the_call_goes_over_a_changed_entry() -> None:
    assert read_draft(Plan(), 0.7, {"keep": 0.5}).plan.keep == 0.7


@pytest.mark.parametrize(
    ("keep", "changes", "told"),
    [
        (1.5, {}, "--keep 1.5: keep: 1.5 is outside (0, 1]"),
        (None, {"kep": 0.5}, "--set kep=0.5: kep: unknown key; did you mean 'keep'?"),
        (None, {"calibration.sample": 4}, "--set calibration.sample=4: calibration.sample: unknown key"),
        (
            None,
            {"calibration.samples": 0},
            "--set calibration.samples=0: calibration.samples: 0 is too small",
        ),
        (
            None,
            {"components.mlp.selct": "score"},
            "--set components.mlp.selct=score: components.mlp.selct: unknown",
        ),
        (None, {"keep.deep": 1}, "--set keep.deep=1: keep"),
        (None, {"layers.3.keep": 0.5}, "--set layers.3.keep=0.5: layers"),
        (
            None,
            {"allocate": "fisher"},
            "mine.yaml:4: components.mlp.keep: sets a size, but allocate fisher finds the sizes",
        ),
        (
            None,
            {"components.ov": {"keep": 0.5, "exakt": True}},
            "--set components.ov={keep: 0.5, exakt: true}: ",
        ),
    ],
)
def test_a_mistake_names_the_option_that_made_it(
    mine: Path, resolved: Resolved, keep: float | None, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError) as error:
        resolved(read_draft(mine, keep, changes))
    assert told in str(error.value)


def test_a_mistake_of_the_file_goes_where_an_option_replaces_it(tmp_path: Path, resolved: Resolved) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("format: 1\nkeep: 3\n", encoding="utf-8")
    assert resolved(read_draft(path, 0.5)).plan.keep == 0.5


def test_values_are_yaml() -> None:
    read = [read_value(text, "--set x") for text in ("0.5", "uniform", "[0.9, 0.6]", "{rank: 3}", "true")]
    assert read == [0.5, "uniform", [0.9, 0.6], {"rank": 3}, True]
    for text in ("", "{rank: 3", "{rank: 1, rank: 2}"):
        with pytest.raises(UserError, match="--set x"):
            read_value(text, "--set x")


def test_nothing_to_go_by_is_told_with_both_ways() -> None:
    with pytest.raises(UserError, match=r"--keep 0\.8, or name a plan, such as --plan a3-2x"):
        find_draft(None, None, {"method": "svd"})


def test_an_entry_inside_a_section_of_a_rule_can_be_replaced() -> None:
    text = "{keep: 0.5, layers: [{match: 0, projections: {q: {rank: 3, method: svd}}}]}"
    draft = read_draft(text, None, {"layers.0.projections.q.rank": 5})
    (rule,) = draft.plan.layers
    assert rule
    assert rule.q
    assert rule.q.own == {"rank": 5}
    assert draft.document.place(("layers", 0, "q", "rank")) == "--set layers.0.projections.q.rank=5"
