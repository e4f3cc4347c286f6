"""Everything a plan may get wrong is told with its line and what would be right, all of it at once."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from lrc.errors import UserError
from lrc.plan.resolved import ResolvedPlan
from lrc.plan.schema import Plan

HEAD = "format: 1\nkeep: 0.5\n"  # what a case adds begins on line 3


Mistakes = Callable[..., list[str]]


@pytest.fixture
def mistakes(resolved: Callable[..., ResolvedPlan]) -> Mistakes:
    """The lines of the message that refuses a plan."""

    def of(text: str, model: str = "small-llama") -> list[str]:
        with pytest.raises(UserError) as caught:
            resolved(text, model)
        return str(caught.value).splitlines()

    return of


CASES = {
    "unknown key": ("metod: a3", ["3: metod: unknown key; did you mean 'method'?"]),
    "duplicate key": ("keep: 0.25", ["3: keep: written twice, first on line 2"]),
    "no value": ("components:", ["3: components: has no value"]),
    "unknown section key": (
        "calibration: {sample: 3}",
        ["3: calibration.sample: unknown key; did you mean 'samples'?"],
    ),
    "unknown component": (
        "components: {mpl: {rank: 3}}",
        ["3: components.mpl: unknown key; did you mean 'mlp'?"],
    ),
    "unknown rule key": (
        "layers: [{match: 0, mpl: keep-all}]",
        ["3: layers[0].mpl: unknown key; did you mean 'mlp'?"],
    ),
    "unknown method": ("method: a33", ["3: method: 'a33' is not a method; did you mean 'a3'?"]),
    "unknown method of an entry": (
        "projections: {q: {method: pears, rank: 4}}",
        ["3: projections.q.method: 'pears' is not a method; did you mean 'pairs'?"],
    ),
    "unknown option": (
        "components:\n  mlp: {slect: score}",
        ["4: components.mlp.slect: unknown key; did you mean 'select'?"],
    ),
    "unknown choice": (
        "components: {mlp: {select: scores}}",
        ["3: components.mlp.select: 'scores' is not known; did you mean 'score'?"],
    ),
    "option of the wrong type": (
        "components: {ov: {rounds: 2.5}}",
        ["3: components.ov.rounds: 2.5 is not legal"],
    ),
    "truth is not a number": (
        "components: {ov: {rounds: true}}",
        ["3: components.ov.rounds: True is not legal"],
    ),
    "a number is not truth": ("components: {ov: {exact: 1}}", ["3: components.ov.exact: 1 is not legal"]),
    "text for an option": (
        "method: pairs\ncomponents: {qk: {damping: 1e-4}}",
        ["4: components.qk.damping: '1e-4' is text to YAML, not a number; write 0.0001"],
    ),
    "option out of range": (
        "method: pairs\ncomponents: {qk: {damping: -1}}",
        ["4: components.qk.damping: -1 is not legal: it should be greater than or equal to 0"],
    ),
    "infinite option": (
        "method: pairs\ncomponents: {qk: {damping: .inf}}",
        ["4: components.qk.damping: inf is not legal"],
    ),
    "neither entry nor keep-all": (
        "components: {mlp: keepall}",
        ["3: components.mlp: 'keepall' is neither 'keep-all'"],
    ),
    "rank 0": (
        "components: {ov: {rank: 0}}",
        ["3: components.ov.rank: rank 0 keeps nothing; the smallest is 1"],
    ),
    "negative rank": (
        "components: {ov: {rank: -4}}",
        ["3: components.ov.rank: rank -4 keeps nothing; the smallest is 1"],
    ),
    "rank above full": (
        "components: {ov: {rank: 17}}",
        ["3: components.ov.rank: rank 17 is above the full rank; ov has 16"],
    ),
    "rank is true": ("components: {ov: {rank: true}}", ["3: components.ov.rank: True is not a whole number"]),
    "rank is a fraction": (
        "components: {ov: {rank: 2.0}}",
        ["3: components.ov.rank: 2.0 is not a whole number"],
    ),
    "rank is text": (
        "components: {ov: {rank: '8'}}",
        ["3: components.ov.rank: '8' is text to YAML, not a number; write 8"],
    ),
    "odd rotary rank": (
        "components: {qk: {rank: 5}}",
        ["3: components.qk.rank: rank 5 splits a rotary pair; ranks of qk are multiples of 2, such as 4"],
    ),
    "larger than the matrix": (
        "method: pairs\nprojections: {q: {rank: 33}}",
        ["4: projections.q.rank: a pair of rank 33 is larger than the matrix; the largest that is not is 32"],
    ),
    "larger than one of its matrices": (
        "method: pairs\ncomponents: {qk: {rank: 22}}",
        [
            "4: components.qk.rank: k: a pair of rank 22 is larger than the matrix; "
            "the largest that is not is 21"
        ],
    ),
    "rank and keep": (
        "components: {ov: {rank: 3, keep: 0.5}}",
        ["3: components.ov.rank: contradicts keep of the same entry; write one of the two"],
    ),
    "keep of an entry": (
        "components: {ov: {keep: 1.5}}",
        ["3: components.ov.keep: 1.5 is outside (0, 1]; the nearest is 1"],
    ),
    "one end of a gradient": (
        "components: {ov: {keep: [0.5, 0]}}",
        ["3: components.ov.keep: 0 is outside (0, 1]"],
    ),
    "three ends": (
        "components: {ov: {keep: [1, 1, 1]}}",
        ["3: components.ov.keep: a gradient over depth has two ends"],
    ),
    "rule out of range": (
        "layers: [{match: '0-9', keep: 0.9}]",
        ["3: layers[0].match: there is no layer 9; the model has 4 layers, 0 to 3"],
    ),
    "rule from the end out of range": (
        "layers: [{match: -5, keep: 0.9}]",
        ["3: layers[0].match: there is no layer -5; the model has 4 layers, 0 to 3"],
    ),
    "rule backwards": ("layers: [{match: 2-1, keep: 0.9}]", ["3: layers[0].match: '2-1' matches no layer"]),
    "rule with words": (
        "layers: [{match: first, keep: 0.9}]",
        ["3: layers[0].match: 'first' names no layers"],
    ),
    "rule without match": ("layers: [{mlp: keep-all}]", ["3: layers[0].match: is missing"]),
    "rule that says nothing": ("layers: [{match: 0}]", ["3: layers[0]: sets nothing for its layers"]),
    "rules are a list": ("layers: {match: 0}", ["3: layers: {'match': 0} is not a list of rules"]),
    "component and its projection": (
        "components: {qk: {rank: 4}}\nprojections: {k: {rank: 4, method: pairs}}",
        ["4: projections.k: components.qk on line 3 is for the same weights; keep one of the two"],
    ),
    "component and its projection in a rule": (
        "layers: [{match: 0, ov: {rank: 4}, o: {rank: 4, method: pairs}}]",
        ["3: layers[0].o: layers[0].ov on line 3 is for the same weights; keep one of the two"],
    ),
    "two rules for one thing": (
        "layers:\n- {match: 0-2, mlp: keep-all}\n- {match: 2-3, gate: {rank: 2, method: pairs}}",
        [
            "5: layers[1].gate: layers[0].mlp on line 4 is for the same weights in layers 2; "
            "keep one of the two"
        ],
    ),
    "two rules for one size": (
        "layers:\n- {match: 0-2, keep: 0.9}\n- {match: 1-3, keep: 0.8}",
        ["5: layers[1].keep: the rule on line 4 sets it too in layers 1-2; keep one of the two"],
    ),
    "entry without effect": (
        "components: {mlp: {rank: 4}}\nlayers: [{match: 0-3, mlp: keep-all}]",
        ["3: components.mlp.rank: has no effect", "3: components.mlp: has no effect"],
    ),
    "size without effect": (
        "components: {mlp: {rank: 4, select: leverage}}\nlayers: [{match: 0-3, keep: 0.25}]",
        ["3: components.mlp.rank: has no effect"],
    ),
    "rule's size without effect": (
        "layers: [{match: 0, keep: 0.9, qk: keep-all, ov: keep-all, mlp: keep-all}]",
        ["3: layers[0].keep: has no effect"],
    ),
    "no such projection": (
        "projections: {fc_in: {rank: 4}}",
        ["3: projections.fc_in: llama has no projection 'fc_in'; "],
    ),
    "method has no solver": (
        "projections: {q: {rank: 4}}",
        [
            "3: projections.q: method 'a3' is for qk, ov, mlp, not for q, a single projection; "
            "known: gradient_pairs, pairs"
        ],
    ),
    "method has no solver of a component": (
        "components: {qk: {method: narrow}}",
        ["3: components.qk: method 'narrow' is for mlp, not for qk; known: a3, gradient_pairs, pairs, picky"],
    ),
    "statistic not collected": (
        "method: gradient_pairs",
        [
            "3: method: 'gradient_pairs' needs gradients, which lrc does not collect yet; "
            "these do without: pairs"
        ],
    ),
    "method cannot do the model": (
        "components: {qk: {method: picky}}",
        ["3: components.qk: 'picky' cannot do this model: its heads share keys"],
    ),
    "allocation beside sizes": (
        "allocate: fisher\ncomponents: {mlp: {rank: 9}, qk: keep-all}\nlayers: [{match: 0, keep: 0.5}]",
        [
            "4: components.mlp.rank: sets a size, but allocate fisher finds the sizes",
            "5: layers[0].keep: sets a size, but allocate fisher finds the sizes",
        ],
    ),
    "statistic of an option not collected": (
        "components: {ov: {method: curious, metric: loss}}",
        ["3: components.ov: these options of 'curious' need gradients, which lrc does not collect yet"],
    ),
    "unknown allocation": (
        "allocate: unifrom",
        ["3: allocate: 'unifrom' is not known; did you mean 'uniform'?"],
    ),
    "method that cannot do the embedding": (
        "projections: {embed: {rank: 4}}",
        [
            "3: projections.embed: method 'a3' is for qk, ov, mlp, not for embed, a single projection; known: pairs"
        ],
    ),
    "method of projections for the embedding": (
        "projections: {embed: {method: gradient_pairs, rank: 4}}",
        ["3: projections.embed: method 'gradient_pairs' is for projection, not for embed"],
    ),
    "head by gradients": (
        "projections: {lm_head: {method: gradient_pairs, rank: 4}}",
        [
            "3: projections.lm_head.method: 'gradient_pairs' needs gradients, "
            "which lrc does not collect yet outside the layers"
        ],
    ),
    "embedding without a size": (
        "projections: {embed: {method: pairs}}",
        ["3: projections.embed: has no size; write rank or keep, as the plan's own keep is of the layers"],
    ),
    "embedding over depth": (
        "projections: {embed: {method: pairs, keep: [0.9, 0.5]}}",
        ["3: projections.embed.keep: is outside the layers; write one fraction, not two"],
    ),
    "embedding of two sizes": (
        "projections: {embed: {method: pairs, keep: 0.5, rank: 4}}",
        ["3: projections.embed.rank: contradicts keep of the same entry"],
    ),
    "embedding larger than it was": (
        "projections: {embed: {method: pairs, rank: 52}}",
        [
            "3: projections.embed.rank: a pair of rank 52 is larger than the matrix; the largest that is not is 51"
        ],
    ),
    "embedding in a layer": ("layers: [{match: 0, embed: {rank: 4}}]", ["3: layers[0].embed: unknown key"]),
    "unknown refit": ("refit: residuals", ["3: refit: 'residuals' is not known; did you mean 'residual'?"]),
    "unknown scale": ("scale: 0.9", ["3: scale: 0.9 is not known; known: channels, logits, none"]),
    "scale without refit": (
        "refit: none\nscale: logits",
        ["4: scale: logits needs 'refit: residual'; with 'refit: none' the nearest is none"],
    ),
    "no samples": (
        "calibration: {samples: 0}",
        ["3: calibration.samples: 0 is too small; the smallest is 1"],
    ),
    "samples in words": (
        "calibration: {samples: al}",
        ["3: calibration.samples: 'al' is not a whole number"],
    ),
    "weights of texts": (
        "calibration:\n  data:\n    a: 0\n    b: -1\n    c: 1e-4\n    d: true\n    e: 2",
        [
            "5: calibration.data.a: a weight of 0 draws no blocks",
            "6: calibration.data.b: a weight of -1 draws no blocks",
            "7: calibration.data.c: '1e-4' is text to YAML, not a number; write 0.0001",
            "8: calibration.data.d: True is not a number; a weight is above 0, such as 2",
        ],
    ),
    "text twice in a list": (
        "calibration: {data: [a, b, a, 3]}",
        ["3: calibration.data[2]: 'a' is written twice", "3: calibration.data[3]: 3 is not a name"],
    ),
    "no text": ("calibration: {data: []}", ["3: calibration.data: [] names no text"]),
    "a number for a text": ("calibration: {data: 5}", ["3: calibration.data: 5 names no text"]),
    "no gradient samples": (
        "calibration: {gradient_samples: 0}",
        ["3: calibration.gradient_samples: 0 is too small; the smallest is 1"],
    ),
    "first tokens that do not count": (
        "calibration: {first_token: 0}",
        ["3: calibration.first_token: 0 is too small; the smallest is 1"],
    ),
    "seed is true": ("calibration: {seed: true}", ["3: calibration.seed: True is not a whole number"]),
    "window longer than the model's": (
        "calibration: {seq_len: 512}",
        ["3: calibration.seq_len: 512 is longer than the model reads; the nearest is 256"],
    ),
}


@pytest.mark.parametrize(("text", "expected"), CASES.values(), ids=CASES)
def test_a_mistake_is_named_with_its_line_and_what_is_right(
    mistakes: Mistakes, text: str, expected: list[str]
) -> None:
    found = mistakes(HEAD + text)
    assert len(found) == len(expected), found
    for line, start in zip(sorted(found), sorted(expected), strict=True):
        assert line.startswith(f"p.yaml:{start}"), line


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("0", "0 is outside (0, 1]"),
        ("-0.5", "-0.5 is outside (0, 1]"),
        ("1.01", "1.01 is outside (0, 1]; the nearest is 1"),
        ("1" + "0" * 400, "1000"),
        (".nan", "nan is outside (0, 1]"),
        ("true", "True is not a number"),
        ("1e-4", "'1e-4' is text to YAML, not a number; write 0.0001"),
        ("1e-7", "'1e-7' is text to YAML, not a number; write 1.0e-07"),
        ("nan", "'nan' is not a number"),
        ("half", "'half' is not a number"),
    ],
)
def test_keep_is_a_fraction(mistakes: Mistakes, keep: str, message: str) -> None:
    assert mistakes(f"format: 1\nkeep: {keep}\n")[0].startswith(f"p.yaml:2: keep: {message}")


def test_the_number_that_a_message_proposes_is_one_to_yaml(resolved: Callable[..., ResolvedPlan]) -> None:
    assert resolved("format: 1\nkeep: 1.0e-07\n").plan.keep == 1e-7


def test_format_is_required_and_known(mistakes: Mistakes) -> None:
    assert mistakes("keep: 0.5\n") == ["p.yaml:1: format: is missing; write 'format: 1'"]
    assert mistakes("keep: 0.5\nformat: 2\n")[0].startswith("p.yaml:2: format: format 2 is not known")
    assert mistakes("keep: 0.5\nformat: true\n")[0].startswith("p.yaml:2: format: format True is not known")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format: 1\nkeep: [0.5\n", "p.yaml:3: not valid YAML: "),
        ("format: 1\nkeep: 0.5\n\tmethod: a3\n", "p.yaml:3: not valid YAML: "),
        ("format: 1\n---\nformat: 1\n", "p.yaml:2: not valid YAML: "),
        ("format: 1\nkeep: !!python/name:os.system\n", "p.yaml:2: not valid YAML: "),
        ("format: 1\nkeep: 2026-13-45\n", "p.yaml:2: not valid YAML: month must be in 1..12"),
        (
            "format: 1\nlayers: &a [*a]\n",
            "p.yaml: not a plan: nested too deeply, or an anchor contains itself",
        ),
        ("format: 1\nkeep: *none\n", "p.yaml:2: not valid YAML: found undefined alias"),
        ("format: 1\n[a]: 1\n", "p.yaml:2: not valid YAML: a key must be a word"),
        ("format: " + "[" * 5000, "p.yaml: not a plan: nested too deeply"),
        ("format: \x00", "p.yaml: not valid YAML: "),
        ("", "p.yaml:1: a plan is a mapping"),
        ("- 1\n", "p.yaml:1: a plan is a mapping"),
    ],
)
def test_what_is_not_yaml_is_told_with_its_line(mistakes: Mistakes, text: str, message: str) -> None:
    (found,) = mistakes(text)
    assert found.startswith(message)


def test_gpt2_names_its_own_projections(mistakes: Mistakes) -> None:
    text = HEAD + "projections: {gate: {rank: 4, method: pairs}}"
    expected = "p.yaml:3: projections.gate: gpt2 has no projection 'gate'; known: fc_in, fc_out, k, o, q, v"
    assert mistakes(text, "small-gpt2") == [expected]


def test_the_head_of_a_tied_model_is_its_embedding(mistakes: Mistakes) -> None:
    text = HEAD + "projections: {lm_head: {rank: 4, method: pairs}}"
    message = "the head of this model is tied to its embedding; write embed for both"
    assert mistakes(text, "small-gpt2") == [f"p.yaml:3: projections.lm_head: {message}"]


def test_every_mistake_is_told_at_once_in_the_order_of_the_lines(mistakes: Mistakes) -> None:
    found = mistakes(
        """
        keep: 1.5
        metod: a3
        components:
          qk: {rank: 3}
          ov: {rank: 99, rouns: 2}
        projections:
          embed: {rank: 4}
          fc_in: {rank: 5}
        layers:
          - {match: "9", keep: 0.5}
          - {macth: 3}
          - 5
          - {match: 3, mlp: {select: none}}
        calibration: {samples: true, seq_len: 4096}
        allocate: energie
        refit: maybe
        """
    )
    places = [line.split(": ")[:2] for line in found]
    assert places == [
        ["p.yaml:1", "format"],
        ["p.yaml:1", "keep"],
        ["p.yaml:2", "metod"],
        ["p.yaml:4", "components.qk.rank"],
        ["p.yaml:5", "components.ov.rank"],
        ["p.yaml:5", "components.ov.rouns"],
        ["p.yaml:7", "projections.embed"],
        ["p.yaml:8", "projections.fc_in"],
        ["p.yaml:10", "layers[0].match"],
        ["p.yaml:11", "layers[1].macth"],
        ["p.yaml:11", "layers[1].match"],
        ["p.yaml:12", "layers[2]"],
        ["p.yaml:13", "layers[3].mlp.select"],
        ["p.yaml:14", "calibration.samples"],
        ["p.yaml:14", "calibration.seq_len"],
        ["p.yaml:15", "allocate"],
        ["p.yaml:16", "refit"],
    ]


@pytest.mark.parametrize(
    ("text", "place", "right"),
    [
        ("samples: 16", "samples", "'calibration: {samples: 16}'"),
        ("seq-len: 64", "seq-len", "'calibration: {seq_len: 64}'"),
        ("calibration.seed: 3", "calibration.seed", "'calibration: {seed: 3}'"),
        ("data: {a: 1, b: 2}", "data", "'calibration: {data: {a: 1, b: 2}}'"),
        ("mlp: keep-all", "mlp", "'components: {mlp: keep-all}'"),
        ("q: {rank: 4}", "q", "'projections: {q: {rank: 4}}'"),
        ("embed: {rank: 4}", "embed", "'projections: {embed: {rank: 4}}'"),
        ("match: 0-1", "match", "'layers: [{match: 0-1, ...}]'"),
        ("rank: 4", "rank", "'components: {mlp: {rank: 4}}'"),
        ("device: cpu", "device", "--device"),
        ("batch_size: 4", "batch_size", "--batch-size"),
        ("calibration: {refit: none}", "calibration.refit", "'refit: none' at the top"),
        ("calibration: {batch_size: 2}", "calibration.batch_size", "--batch-size"),
        ("components: {q: {rank: 4}}", "components.q", "'projections: {q: {rank: 4}}'"),
        ("components: {keep: 0.3}", "components.keep", "'keep: 0.3' at the top"),
        ("components: {mlp: {rank: 4, samples: 9}}", "components.mlp.samples", "'calibration: {samples: 9}'"),
        ("components: {mlp: {rank: 4, refit: none}}", "components.mlp.refit", "'refit: none' at the top"),
        ("components: {mlp: {k: {rank: 2}}}", "components.mlp.k", "'projections: {k: {rank: 2}}'"),
        ("projections: {mlp: keep-all}", "projections.mlp", "'components: {mlp: keep-all}'"),
        ("layers: [{match: 0, keep: 0.7, samples: 9}]", "layers[0].samples", "'calibration: {samples: 9}'"),
        ("layers: [{match: 0, keep: 0.7, scale: none}]", "layers[0].scale", "'scale: none' at the top"),
        ("layers: [{match: 0, keep: 0.7, rank: 9}]", "layers[0].rank", "'mlp: {rank: 9}'"),
        (
            "layers: [{match: 0, lm_head: keep-all}]",
            "layers[0].lm_head",
            "'projections: {lm_head: keep-all}'",
        ),
        ("layers: [{match: 0, mlp: {rank: 4, seed: 1}}]", "layers[0].mlp.seed", "'calibration: {seed: 1}'"),
        (
            "layers: [{match: 0, components: {mlp: {rank: 4, seed: 1}}}]",
            "layers[0].mlp.seed",
            "'calibration: {seed: 1}'",
        ),
    ],
)
def test_a_key_of_another_place_is_told_where_it_belongs(
    mistakes: Mistakes, text: str, place: str, right: str
) -> None:
    (found,) = mistakes(HEAD + text)
    assert found.startswith(f"p.yaml:3: {place}: ")
    assert right in found


def test_a_plan_made_in_python_is_told_where_a_key_belongs() -> None:
    for value, shown in ((16, "16"), (object(), "...")):
        with pytest.raises(UserError, match="calibration: {samples: " + re.escape(shown)):
            Plan(samples=value)  # type: ignore[call-arg]


def test_a_mistake_in_a_nested_rule_has_its_line(mistakes: Mistakes) -> None:
    rule = "layers:\n- match: 0\n  keep: 0.4\n  projections:\n    q: {rank: 4, method: pairs}\n    "
    (found,) = mistakes(HEAD + rule + "k: {rank: 99, method: pairs}")
    assert found.startswith("p.yaml:8: layers[0].k.rank: rank 99 is above")
    (found,) = mistakes(HEAD + rule + "qq: {rank: 2}")
    assert found.startswith("p.yaml:8: layers[0].qq: unknown key; did you mean")
    (found,) = mistakes(HEAD + rule + "k: keep-all\n  k: keep-all")
    assert found.startswith("p.yaml:8: layers[0].projections.k: this rule has the entry twice")
