"""A plan that is written is the plan that is read."""

from __future__ import annotations

from dataclasses import replace

from lrc.methods import methods
from lrc.moments import collectors
from lrc.plan.library import write_plan
from lrc.plan.resolve import parse_plan, resolve

BASE = """
format: 1
keep: 0.5
method: a3
refit: none
calibration: {samples: 7, seed: 3}
components:
  mlp: {refit: none}
layers:
  - {match: 1, method: whitened_svd, keep: 0.4}
  - {match: 3, ov: {method: svd}}
"""


def test_comes_back_as_it_was(architecture):
    shapes = architecture("small-llama")
    plan = resolve(parse_plan(BASE, "base.yaml"), shapes, methods(), collectors())
    text = write_plan(plan, methods(), ["a", "", "b\nc: d"])
    again = resolve(parse_plan(text, "again.yaml"), shapes, methods(), collectors())
    assert again.layers == plan.layers
    assert again.warnings == ()
    assert (again.plan.refit, again.plan.calibration) == ("none", plan.plan.calibration)
    assert text.startswith("# a\n#\n# b c: d\nformat: 1\n")


def test_the_scale_comes_back_where_it_was_written(architecture):
    shapes = architecture("small-llama")
    for line, scale, scales in (
        ("", None, True),
        ("scale: none", "none", False),
        ("scale: channels", "channels", True),
        ("scale: logits", "logits", True),
        ("refit: none", None, False),
    ):
        plan = resolve(
            parse_plan(f"format: 1\nkeep: 0.5\n{line}\n", "p.yaml"), shapes, methods(), collectors()
        )
        text = write_plan(plan, methods(), [])
        again = resolve(parse_plan(text, "q.yaml"), shapes, methods(), collectors()).plan
        assert (again.scale, again.scales) == (plan.plan.scale, plan.plan.scales) == (scale, scales)


def test_a_mixture_of_texts_comes_back_too(architecture):
    shapes = architecture("small-llama")
    for data, read in (("{a:b: 2, c: 0.5}", {"a:b": 2, "c": 0.5}), ("[a, b]", ("a", "b")), ("a=1", "a=1")):
        base = f"format: 1\nkeep: 0.5\ncalibration: {{data: {data}}}\n"
        plan = resolve(parse_plan(base, "p.yaml"), shapes, methods(), collectors())
        assert plan.plan.calibration.data == read
        text = write_plan(plan, methods(), [])
        assert (
            resolve(parse_plan(text, "q.yaml"), shapes, methods(), collectors()).plan.calibration.data == read
        )


def test_layers_alike_share_a_rule_and_whole_targets_say_so(architecture):
    shapes = architecture("small-llama")
    base = "format: 1\nkeep: 0.5\ncomponents: {qk: {metric: attention}}\n"
    plan = resolve(parse_plan(base, "p.yaml"), shapes, methods(), collectors())
    whole = [
        replace(
            layer,
            assignments=tuple(
                replace(a, size=176, kept=a.whole) if a.target == "mlp" else a for a in layer.assignments
            ),
        )
        for layer in plan.layers[1:3]
    ]
    layers = (plan.layers[0], *whole, plan.layers[3])
    lines = write_plan(replace(plan, layers=layers), methods(), []).splitlines()
    assert lines[2:5] == [
        "layers:",
        "  - {match: '0, 3', qk: {rank: 8}, ov: {rank: 8}, mlp: {rank: 88}}",
        "  - {match: 1-2, qk: {rank: 8}, ov: {rank: 8}, mlp: keep-all}",
    ]


def test_what_is_outside_the_layers_comes_back_too(architecture):
    shapes = architecture("small-llama")
    base = "format: 1\nkeep: 0.5\nprojections: {embed: {method: svd, rank: 9}, lm_head: {method: monarch, keep: 0.5}}\n"
    plan = resolve(parse_plan(base, "p.yaml"), shapes, methods(), collectors())
    again = parse_plan(write_plan(plan, methods(), []), "q.yaml")
    assert resolve(again, shapes, methods(), collectors()).outer == plan.outer != ()


def test_sizes_that_were_found_outside_the_layers_are_written(architecture):
    shapes = architecture("small-llama")
    base = "format: 1\nkeep: 0.5\nallocate: energy\nprojections: {embed: {method: svd}, lm_head: {method: svd}}\n"
    plan = resolve(parse_plan(base, "p.yaml"), shapes, methods(), collectors())
    embed, head = plan.outer
    found = replace(plan, outer=(replace(embed, size=9), replace(head, size=64, kept=head.whole)))
    text = write_plan(found, methods(), [])
    assert "projections: {embed: {rank: 9, method: svd}, lm_head: keep-all}\n" in text
    again = resolve(parse_plan(text, "q.yaml"), shapes, methods(), collectors())
    assert [(a.target, a.size) for a in again.outer] == [("embed", 9)]
    # Nor is one that has no size to choose from left open.
    none = write_plan(replace(plan, outer=(embed,)), methods(), [])
    assert "lm_head: keep-all}" in none
