"""Which entry counts where, and what sizes come of it: 4 layers of heads of 16 and 176 neurons."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from lrc.plan.precedence import spans
from lrc.plan.resolved import ResolvedPlan
from lrc.plan.schema import Plan

Resolved = Callable[..., ResolvedPlan]


def sizes(plan: ResolvedPlan, layer: int = 0) -> dict[str, int]:
    return {a.target: a.size for a in plan.layers[layer].assignments}


def test_one_dial_sets_every_component(resolved: Resolved) -> None:
    plan = resolved("{format: 1, keep: 0.5}")
    assert [sizes(plan, i) for i in range(4)] == [{"qk": 8, "ov": 8, "mlp": 88}] * 4
    assert plan.keep == 0.5
    assert plan.kept * 2 == plan.whole == 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 176)
    assert plan.warnings == ()


def test_a_method_of_projections_takes_the_same_dial(resolved: Resolved) -> None:
    plan = resolved("{format: 1, keep: 0.5, method: pairs}")
    # keep times mn / (m + n), rounded down
    assert sizes(plan) == {"q": 16, "k": 10, "v": 10, "o": 16, "gate": 23, "up": 23, "down": 23}
    kept = 4 * (2 * 16 * 128 + 2 * 10 * 96 + 3 * 23 * 240)
    assert plan.kept == kept
    assert plan.keep == kept / plan.whole


def test_a_component_that_no_entry_names_may_come_apart_where_positions_turn(resolved: Resolved) -> None:
    apart, whole = {"q": 16, "k": 10, "ov": 8, "mlp": 88}, {"qk": 8, "ov": 8, "mlp": 88}
    text = "{format: 1, keep: 0.5, method: unturned}"
    assert sizes(resolved(text)) == apart
    assert {a.target: a.method for a in resolved(text).layers[0].assignments} == {
        **dict.fromkeys(("q", "k"), "pairs"),
        **dict.fromkeys(("ov", "mlp"), "unturned"),
    }
    assert set(sizes(resolved(text, "gpt2"))) == {"qk", "ov", "mlp"}
    for named in ("metric: loss", "rank: 8", "keep: 0.5"):
        assert sizes(resolved(f"{text[:-1]}, components: {{qk: {{{named}}}}}}}")) == whole
    assert sizes(resolved(f"{text[:-1]}, components: {{qk: keep-all}}}}")) == {"ov": 8, "mlp": 88}
    rules = resolved(f"{text[:-1]}, layers: [{{match: 0, qk: {{metric: loss}}}}, {{match: 1, keep: 0.25}}]}}")
    assert [sizes(rules, i) for i in range(3)] == [whole, {"q": 8, "k": 5, "ov": 4, "mlp": 44}, apart]


def test_a_method_of_one_component_leaves_the_others_whole(resolved: Resolved) -> None:
    assert sizes(resolved("{format: 1, keep: 0.5, method: narrow}")) == {"mlp": 88}


def test_a_component_is_short_for_its_projections_where_the_method_solves_those(resolved: Resolved) -> None:
    plan = resolved("{format: 1, keep: 0.5, method: pairs, components: {qk: {rank: 5}, mlp: {keep: 0.25}}}")
    assert sizes(plan) == {"q": 5, "k": 5, "v": 10, "o": 16, "gate": 11, "up": 11, "down": 11}


def test_levels_go_over_one_another(resolved: Resolved) -> None:
    plan = resolved(
        """
        format: 1
        keep: 0.5
        components:
          qk: {rank: 4}
          mlp: {keep: 0.25, select: leverage}
        layers:
          - {match: "0", qk: keep-all, mlp: {rank: 100}}
          - {match: 1, keep: 0.75}
          - {match: "-1", method: pairs}
        """
    )
    assert sizes(plan, 0) == {"ov": 8, "mlp": 100}
    assert sizes(plan, 1) == {"qk": 12, "ov": 12, "mlp": 132}
    assert sizes(plan, 2) == {"qk": 4, "ov": 8, "mlp": 44}
    assert sizes(plan, 3) == {"q": 16, "k": 10, "v": 10, "o": 16, "gate": 23, "up": 23, "down": 23}
    chosen = [
        a.options["select"] for layer in plan.layers[:3] for a in layer.assignments if a.target == "mlp"
    ]
    assert chosen == [
        "score",
        "leverage",
        "leverage",
    ]  # the rule's entry replaces, the rule's keep only resizes


def test_an_entry_may_bring_its_own_method(resolved: Resolved) -> None:
    plan = resolved(
        "{format: 1, keep: 0.5, components: {mlp: {method: pairs}}, layers: [{match: 0, mlp: {rank: 9}}]}"
    )
    assert sizes(plan, 0) == {"qk": 8, "ov": 8, "mlp": 9}
    assert sizes(plan, 1) == {"qk": 8, "ov": 8, "gate": 23, "up": 23, "down": 23}


def test_a_rule_for_a_component_drops_its_projections_and_the_other_way_round(resolved: Resolved) -> None:
    plan = resolved(
        """
        format: 1
        keep: 0.5
        components: {ov: {rank: 4}}
        projections: {q: {rank: 4, method: pairs}, k: {rank: 3, method: pairs}}
        layers:
          - {match: 0, qk: {rank: 6}}
          - {match: 1, v: {rank: 2, method: pairs}, o: {rank: 5, method: pairs}}
        """
    )
    assert sizes(plan, 0) == {"qk": 6, "ov": 4, "mlp": 88}
    assert sizes(plan, 1) == {"q": 4, "k": 3, "v": 2, "o": 5, "mlp": 88}
    assert sizes(plan, 2) == {"q": 4, "k": 3, "ov": 4, "mlp": 88}
    assert plan.warnings == ()


def test_a_projection_in_a_components_place_warns_of_what_stays_whole(resolved: Resolved) -> None:
    plan = resolved("{format: 1, keep: 0.5, layers: [{match: '0,2-3', q: {rank: 4, method: pairs}}]}")
    assert sizes(plan) == {"ov": 8, "mlp": 88, "q": 4}
    expected = "p.yaml:1: layers[0].q: takes the place of all of qk, so k stays whole (layers 0, 2-3)"
    assert plan.warnings == (expected,)


def test_a_projection_beside_shorthand_replaces_only_its_own(resolved: Resolved) -> None:
    plan = resolved(
        "{format: 1, method: pairs, components: {qk: {rank: 5}}, layers: [{match: 0, q: {rank: 7}}]}"
    )
    assert (sizes(plan, 0), sizes(plan, 1)) == ({"q": 7, "k": 5}, {"q": 5, "k": 5})
    assert plan.warnings == ()


@pytest.mark.parametrize("entry", ["keep-all", "{keep: 1}", "{keep: 1.0, rounds: 2}", "{rank: 16}"])
def test_four_ways_to_keep_a_component_whole(resolved: Resolved, entry: str) -> None:
    plan = resolved(f"{{format: 1, keep: 0.5, components: {{ov: {entry}}}}}")
    assert sizes(plan) == {"qk": 8, "mlp": 88}
    assert plan.warnings == ()


def test_to_keep_a_projection_needs_no_method_that_could_shrink_it(resolved: Resolved) -> None:
    assert sizes(resolved("{format: 1, projections: {q: keep-all}, components: {mlp: {rank: 5}}}")) == {
        "mlp": 5
    }


def test_a_gradient_runs_linearly_from_the_first_layer_to_the_last(resolved: Resolved) -> None:
    plan = resolved("{format: 1, keep: [1, 0.25], components: {qk: {keep: [0.25, 0.625]}}}")
    assert [sizes(plan, i).get("ov") for i in range(4)] == [None, 12, 8, 4]
    assert [sizes(plan, i)["qk"] for i in range(4)] == [4, 6, 8, 10]
    assert sizes(resolved("{format: 1, keep: [0.1, 1]}"), 3) == {}
    assert [sizes(plan, i).get("mlp") for i in range(4)] == [None, 132, 88, 44]


def test_a_pair_as_large_as_its_matrix_warns_and_stays_dense(resolved: Resolved) -> None:
    plan = resolved("{format: 1, method: pairs, projections: {q: {rank: 32}, o: {rank: 31}}}")
    assert sizes(plan) == {"o": 31}
    assert plan.warnings == ("p.yaml:1: projections.q.rank: rank 32 saves nothing for q; it stays dense",)


def test_a_fraction_that_no_size_meets_warns(resolved: Resolved) -> None:
    plan = resolved("format: 1\nkeep: 0.1\n")
    assert sizes(plan) == {"qk": 2, "ov": 1, "mlp": 17}
    said = "p.yaml:2: keep: 0.1 is too small for qk: its smallest size keeps 0.125 of its weights"
    assert plan.warnings == (said,)
    narrow = resolved("format: 1\nkeep: 0.5\n", "narrow-llama")
    assert sizes(narrow) == {"ov": 1, "mlp": 88}
    said = "p.yaml:2: keep: 0.5 is too small for qk: its smallest size saves nothing, so it stays whole"
    assert narrow.warnings == (said,)


@pytest.mark.parametrize("model", ["small-llama", "small-gpt2", "llama-8k"])
@pytest.mark.parametrize("method", ["a3", "pairs", "unturned"])
def test_never_more_is_kept_than_asked(resolved: Resolved, model: str, method: str) -> None:
    for keep in (0.13, 0.29, 1 / 3, 0.5, 0.7, 0.8, 0.801, 0.98, 0.999):
        plan = resolved(f"{{format: 1, keep: {keep}, method: {method}}}", model)
        assert keep - 0.2 < plan.keep <= keep
        assert plan.warnings == ()


def test_a_plan_that_shrinks_nothing_warns(resolved: Resolved) -> None:
    assert resolved("format: 1\nkeep: 1\n").warnings == ("p.yaml:2: keep: every layer stays whole",)


def test_rules_match_numbers_lists_ranges_and_from_the_end(resolved: Resolved) -> None:
    for match, layers in {
        "0-1": {0, 1},
        "3": {3},
        "0,2-3": {0, 2, 3},
        "-1": {3},
        "-2--1": {2, 3},
        "1--1": {1, 2, 3},
    }.items():
        plan = resolved(f"{{format: 1, keep: 0.5, layers: [{{match: '{match}', mlp: keep-all}}]}}")
        assert {i for i in range(4) if "mlp" not in sizes(plan, i)} == layers


def test_anchors_and_merges_are_yaml_as_usual(resolved: Resolved) -> None:
    plan = resolved(
        """
        format: 1
        keep: 0.5
        layers:
          - &rule {match: 0, mlp: {rank: 5}, ov: {rank: 3}}
          - {<<: *rule, match: 1, ov: {rank: 2}}
        """
    )
    assert sizes(plan, 0) == {"qk": 8, "ov": 3, "mlp": 5}
    assert sizes(plan, 1) == {"qk": 8, "ov": 2, "mlp": 5}


def test_components_without_rotary_positions_take_odd_ranks(resolved: Resolved) -> None:
    plan = resolved("{format: 1, keep: 0.5, components: {qk: {rank: 3}}}", "small-gpt2")
    assert sizes(plan) == {"qk": 3, "ov": 4, "mlp": 64}


def test_calibration_windows_default_to_the_models_limit(resolved: Resolved) -> None:
    assert resolved("{format: 1, keep: 0.5}").seq_len == 256
    assert resolved("{format: 1, keep: 0.5, calibration: {seq_len: 100}}").seq_len == 100
    assert resolved("{format: 1, keep: 0.5}", "gpt2").seq_len == 1024
    assert resolved("{format: 1, keep: 0.5}", "llama-8k").seq_len == 2048


def test_first_tokens_count_for_one_in_so_many(resolved: Resolved) -> None:
    for length, count in ((100, 1), (511, 1), (512, 2), (2048, 8)):
        text = f"{{format: 1, keep: 0.5, calibration: {{seq_len: {length}}}}}"
        assert resolved(text, "llama-8k").first_token == count
    assert resolved("{format: 1, keep: 0.5}", "llama-8k").first_token == 8
    plan = resolved("{format: 1, keep: 0.5, calibration: {first_token: 3}}", "llama-8k")
    assert plan.first_token == plan.as_dict()["first_token"] == 3


def test_options_are_complete_and_the_json_is_equal_for_equal_work(resolved: Resolved) -> None:
    one = resolved("{format: 1, keep: 0.5, components: {ov: {rounds: 2}}}")
    two = resolved("# the same, written otherwise\ncomponents:\n  ov:\n    rounds: 2\nkeep: 0.5\nformat: 1\n")
    assert one.layers[0].assignments[1].options == {"rounds": 2, "exact": False}
    assert json.dumps(one.as_dict(), sort_keys=True) == json.dumps(two.as_dict(), sort_keys=True)
    other = resolved("{format: 1, keep: 0.5, components: {ov: {rounds: 3}}}")
    assert one.as_dict() != other.as_dict()


def test_layer_numbers_are_written_as_spans() -> None:
    assert spans({7, 0, 1, 2}) == "0-2, 7"


def test_what_is_outside_the_layers_has_sizes_of_its_own(resolved: Resolved) -> None:
    plan = resolved(
        """
        format: 1
        keep: 0.5
        method: pairs
        projections:
          embed: {rank: 20}
          lm_head: {keep: 0.5}
        """
    )
    embed, head = plan.outer
    assert (embed.target, embed.size, embed.kept, embed.whole) == ("embed", 20, 20 * (256 + 64), 256 * 64)
    assert (head.target, head.size, head.options) == ("lm_head", 25, {"damping": 1e-6})
    assert plan.keep == resolved("{format: 1, keep: 0.5, method: pairs}").keep
    assert plan.as_dict()["outer"][0]["target"] == "embed"


def test_the_embedding_alone_may_be_all_that_is_asked(resolved: Resolved) -> None:
    plan = resolved("{format: 1, projections: {embed: {method: pairs, keep: 0.5}}}", "small-gpt2")
    assert [a.target for a in plan.outer] == ["embed"]
    assert plan.keep == 1
    assert plan.warnings == ()


def test_an_embedding_that_stays_whole_is_left_alone(resolved: Resolved) -> None:
    assert resolved("{format: 1, keep: 0.5, projections: {embed: keep-all}}").outer == ()
    plan = resolved("{format: 1, keep: 0.5, projections: {embed: {method: pairs, rank: 51}}}")
    assert [a.size for a in plan.outer] == [51]


def test_an_allocation_takes_sizes_outside_the_layers_as_they_are(resolved: Resolved) -> None:
    entries = "projections: {embed: {rank: 20}, lm_head: {keep: 0.5}}"
    plan = resolved(f"{{format: 1, keep: 0.5, method: pairs, allocate: energy, {entries}}}")
    assert [(a.target, a.size) for a in plan.outer] == [("embed", 20), ("lm_head", 25)]


def test_an_allocation_finds_the_sizes_outside_the_layers_that_are_not_said(resolved: Resolved) -> None:
    text = "{{format: 1, keep: 0.5, method: pairs, {}, projections: {{embed: {{}}, lm_head: {{rank: 20}}}}}}"
    plan = resolved(text.format("allocate: energy"))
    assert [(a.target, a.size) for a in plan.outer] == [("embed", 25), ("lm_head", 20)]
    assert [a.target for a in plan.unsized(None)] == ["embed"]
    assert plan.shared == ("embed",)
    alone = resolved("{format: 1, keep: 0.5, method: pairs}")
    assert (plan.kept, plan.whole) == (alone.kept, alone.whole)
    table, embed, head = 256 * 64, 25 * (256 + 64), 20 * (256 + 64)
    share, tables = plan.budget, plan.with_tables
    assert (share.of, share.kept, share.whole) == (
        "decoder and embedding",
        plan.kept + embed,
        plan.whole + table,
    )
    assert tables is not None
    assert tables.of == "decoder, embedding and head"
    assert tables.keep == (plan.kept + embed + head) / (plan.whole + 2 * table)
    assert (alone.with_tables, alone.budget.of) == (None, "decoder")
    assert alone.budget.keep == alone.keep


def test_a_table_that_stays_whole_counts_where_the_plan_names_it(resolved: Resolved) -> None:
    plan = resolved("{format: 1, keep: 0.5, projections: {lm_head: keep-all}}")
    assert plan.shared == ()
    assert plan.with_tables is not None
    assert plan.with_tables.of == "decoder and head"
    assert plan.with_tables.kept == plan.kept + 256 * 64


def test_a_rule_may_hold_sections(resolved: Resolved) -> None:
    flat = resolved(
        "{format: 1, keep: 0.5, layers: [{match: 0-1, keep: 0.7, mlp: {rank: 9}, q: {rank: 3, method: pairs}}]}"
    )
    nested = resolved(
        "{format: 1, keep: 0.5, layers: [{match: 0-1, keep: 0.7, components: {mlp: {rank: 9}}, "
        "projections: {q: {rank: 3, method: pairs}}}]}"
    )
    assert nested.as_dict() == flat.as_dict()
    assert sizes(nested) == {"q": 3, "ov": 11, "mlp": 9}
    rules = [{"match": "0", "components": {"mlp": {"rank": 9}}}]
    assert Plan(layers=rules).layers == Plan(layers=[{"match": "0", "mlp": {"rank": 9}}]).layers  # type: ignore[arg-type]
