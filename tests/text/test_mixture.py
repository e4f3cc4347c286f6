"""Mixtures of calibration texts: exact shares, blocks of one source each, an order that mixes, every refusal."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lrc.errors import UserError
from lrc.text.blocks import calibration_blocks, ids_sha256, tokenize
from lrc.text.corpus import Drawn, Source, read_corpus
from lrc.text.mixture import Mixture, interleaved, most, read_mixture, shares

SEQ_LEN = 16
Draw = Callable[..., Drawn]


def ones(count: int) -> Source:
    return Source("synthetic", torch.ones(count, SEQ_LEN, dtype=torch.int64), {"start": 0})


@pytest.fixture
def tokenizer(tiny_checkpoint) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_checkpoint("gpt2"))


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> Draw:
    """Draws blocks of ``a.txt`` (40 blocks of letters a to m) and ``b.txt`` (10 of n to z), 16 tokens each."""
    monkeypatch.chdir(tmp_path)
    for name, first, blocks in (("a.txt", "a", 40), ("b.txt", "n", 10)):
        text = "".join(chr(ord(first) + i * i * i % 13) for i in range(blocks * SEQ_LEN + 5))
        Path(name).write_text(text, encoding="utf-8")

    def drawn(data, samples, seed=0) -> Drawn:
        return read_corpus(read_mixture(data), tokenizer, SEQ_LEN, samples).draw(samples, seed, ones)

    return drawn


# --- shares ---


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(0, 60))
def test_shares_are_those_of_least_distance_from_the_proportion(weights, extra):
    """Largest remainder is the split that is nearest in squares; where all have one anyway, nothing else matters."""
    samples, total = len(weights) + extra, sum(weights)
    found = shares(samples, [Fraction(w) for w in weights])
    assert sum(found) == samples
    assert min(found) >= 1
    quotas = [Fraction(samples * w, total) for w in weights]
    if min(quotas) < 1:
        return
    ways = product(*(range(int(q), int(q) + 2) for q in quotas))
    distances = [
        sum((n - q) ** 2 for n, q in zip(way, quotas, strict=True)) for way in ways if sum(way) == samples
    ]
    assert sum((n - q) ** 2 for n, q in zip(found, quotas, strict=True)) == min(distances)


@pytest.mark.parametrize(
    ("samples", "weights", "expected"),
    [
        (128, ["2", "1"], [85, 43]),
        (10, ["0.7", "0.2", "0.1"], [7, 2, 1]),
        (3, ["1", "1"], [2, 1]),
        (10, ["1000", "1", "1"], [8, 1, 1]),
        (3, ["1000", "1", "1"], [1, 1, 1]),
        (4, ["1", "1", "1000", "1"], [1, 1, 1, 1]),
    ],
)
def test_shares_of_awkward_weights(samples, weights, expected):
    assert shares(samples, [Fraction(w) for w in weights]) == expected


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=4), st.integers(0, 60)
)
def test_the_most_samples_that_do_are_found(sources, extra):
    weights, room = [Fraction(w) for w, _ in sources], [blocks for _, blocks in sources]
    limit = len(sources) + extra
    fits = [
        n
        for n in range(len(sources), limit + 1)
        if all(s <= r for s, r in zip(shares(n, weights), room, strict=True))
    ]
    assert most(weights, room, limit) == fits[-1]


# --- blocks ---


def test_a_mixture_draws_its_shares_and_no_block_has_two_sources(draw):
    found = draw("a.txt=2,b.txt=1", 10)
    of_a = (found.blocks < tokenize_letter("n")).all(dim=1)
    of_b = (found.blocks >= tokenize_letter("n")).all(dim=1)
    assert (of_a.sum(), of_b.sum(), len(found.blocks)) == (7, 3, 10)
    assert torch.equal(found.blocks[of_a], found.sources[0].blocks)
    assert torch.equal(found.blocks[of_b], found.sources[1].blocks)


def tokenize_letter(letter: str) -> int:
    """The id of a letter: its place in the sorted byte-level alphabet, which begins at ``!``."""
    return ord(letter) - ord("!")


def test_each_source_is_drawn_as_it_would_be_alone(draw, tokenizer):
    found = draw({"a.txt": 2, "b.txt": 1}, 10, seed=4)
    for source, name, count in zip(found.sources, ("a.txt", "b.txt"), (7, 3), strict=True):
        ids = tokenize(tokenizer, Path(name).read_text(encoding="utf-8"))
        assert torch.equal(source.blocks, calibration_blocks(ids, count, SEQ_LEN, 4))


def test_sources_are_spread_evenly_and_keep_their_order():
    parts = [torch.arange(6)[:, None], 10 + torch.arange(3)[:, None], 20 + torch.arange(1)[:, None]]
    assert interleaved(parts).flatten().tolist() == [0, 10, 1, 2, 11, 20, 3, 4, 12, 5]
    assert torch.equal(interleaved(parts[:1]), parts[0])


def test_the_draw_is_a_function_of_the_seed(draw):
    one, again, other = (draw("a.txt,b.txt", 8, seed) for seed in (0, 0, 1))
    assert torch.equal(one.blocks, again.blocks)
    assert not torch.equal(one.blocks, other.blocks)


def test_all_takes_everything_or_what_the_scarcest_allows(draw):
    assert [len(s.blocks) for s in draw(["a.txt", "b.txt"], "all").sources] == [40, 10]
    assert [len(s.blocks) for s in draw("a.txt=1,b.txt=1", "all").sources] == [11, 10]
    assert [len(s.blocks) for s in draw("a.txt=5,b.txt=1", "all").sources] == [40, 8]
    assert [len(s.blocks) for s in draw({"a.txt": 3}, "all").sources] == [40]


def test_the_record_names_every_source(draw):
    found = draw({"b.txt": 1, "synthetic": 0.5, "a.txt": 2}, 7, seed=3)
    record = found.as_dict(3)
    assert record["data"] == found.label == "b.txt=1,synthetic=0.5,a.txt=2"
    assert [(s["data"], s["weight"], s["blocks"]) for s in record["sources"]] == [
        ("b.txt", 1, 2),
        ("synthetic", 0.5, 1),
        ("a.txt", 2, 4),
    ]
    assert len(record["sources"][0]["text_sha256"]) == 64
    assert record["sources"][1]["start"] == 0
    assert record["ids_sha256"] == ids_sha256(found.blocks)
    assert (record["samples"], record["seq_len"], record["seed"]) == (7, SEQ_LEN, 3)
    assert found.data == {"b.txt": 1, "synthetic": 0.5, "a.txt": 2}
    assert draw(["a.txt", "b.txt"], 4).data == ("a.txt", "b.txt")
    assert draw("a.txt", 4).data == "a.txt"
    assert "weight" not in draw("a.txt", 4).as_dict(0)["sources"][0]


def test_what_is_to_be_known_of_a_source_names_it(draw):
    (note,) = draw({"a.txt": 1, "builtin:test": 1}, 4).notes
    assert note == "builtin: test split used for calibration"


# --- what a user writes ---


@pytest.mark.parametrize(
    ("text", "names", "weights"),
    [
        ("wikitext2:train", ("wikitext2:train",), None),
        ("wikitext2:train=2, c4:train=1", ("wikitext2:train", "c4:train"), (2, 1)),
        ("wikitext2,c4", ("wikitext2", "c4"), None),
        ("synthetic=0.25,builtin=1e-1", ("synthetic", "builtin"), (0.25, 0.1)),
        ("odd=name,2.txt", ("odd=name,2.txt",), None),
        ("odd=1", ("odd=1",), None),
        ("odd=1=3,c4=2", ("odd=1", "c4"), (3, 2)),
        ("odd=1,c4", ("odd=1", "c4"), None),
    ],
)
def test_a_string_is_read_as_files_and_weights(tmp_path, monkeypatch, text, names, weights):
    monkeypatch.chdir(tmp_path)
    for name in ("odd=name,2.txt", "odd=1"):
        Path(name).write_text("text", encoding="utf-8")
    assert read_mixture(text) == Mixture(names, weights)


def test_names_in_a_mapping_or_a_list_are_taken_as_they_are():
    assert read_mixture({"a,b=1.txt": 2}) == Mixture(("a,b=1.txt",), (2,))
    assert read_mixture(["a=1", "b,c"]) == Mixture(("a=1", "b,c"), None)


@pytest.mark.parametrize(
    ("data", "samples", "message"),
    [
        ("a.txt=1,wikitxt2=1", 4, "unknown text 'wikitxt2': did you mean 'wikitext2'?"),
        ("a.txt,synthetik", 4, "unknown text 'synthetik': did you mean 'synthetic'?"),
        ("a.txt=0,b.txt=1", 4, "a.txt: a weight of 0 "),
        ("a.txt=-2,b.txt=1", 4, "a.txt: a weight of -2 "),
        ("a.txt=nan,b.txt=1", 4, "a.txt: a weight of nan "),
        ("a.txt=inf,b.txt=1", 4, "a.txt: a weight of inf "),
        (
            "a.txt=two,b.txt=1",
            4,
            "a.txt: 'two' is not a number; a weight is above 0, such as 2; there is no file",
        ),
        ("a.txt=,b.txt=1", 4, "a.txt: '' is not a number"),
        ({"a.txt": True}, 4, "a.txt: True is not a number"),
        ({"a.txt": "2"}, 4, "a.txt: '2' is text to YAML, not a number; write 2"),
        ({}, 4, "names no text"),
        ([], 4, "names no text"),
        ("a.txt,", 4, "'' is not a name"),
        ("a.txt=1,b.txt", 4, "'b.txt' has no weight"),
        ("a.txt=1,a.txt=2", 4, "'a.txt' is written twice"),
        (["a.txt", "a.txt"], 4, "1: 'a.txt' is written twice"),
        ("a.txt,./a.txt", 4, "calibration on a.txt and ./a.txt: they are the same text; name it once"),
        ("builtin=1,builtin:train=2", 4, "on builtin and builtin:train: they are the same text"),
        ("synthetic", "all", "samples: all is not possible with synthetic text; give a number"),
        ("a.txt=1,synthetic=1", "all", "samples: all is not possible with synthetic text"),
        (
            "synthetic:train",
            4,
            "no text 'synthetic:train': synthetic, which has no splits, is for calibration",
        ),
        ("a.txt,b.txt,synthetic", 2, "3 sources (a.txt, b.txt, synthetic); use 3 or more"),
        ("gone.txt,a.txt", 4, "gone.txt: no such file"),
    ],
    ids=str,
)
def test_mistakes(draw, data, samples, message):
    with pytest.raises(UserError) as error:
        draw(data, samples)
    assert message in str(error.value)


def test_a_source_that_is_too_short_is_named_with_the_most_that_would_do(draw):
    message = r"calibration on a.txt=2,b.txt=1: b.txt has 10 blocks, fewer than the 12 .* samples: 31"
    with pytest.raises(UserError, match=message):
        draw("a.txt=2,b.txt=1", 36)
    assert [len(s.blocks) for s in draw("a.txt=2,b.txt=1", 31).sources] == [21, 10]


def test_a_source_shorter_than_a_block_is_named(draw):
    Path("short.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(UserError, match=r"calibration on short.txt: the text has 9 tokens, fewer than one"):
        draw("a.txt,short.txt", 4)


def test_a_single_text_says_what_it_always_said(draw):
    with pytest.raises(UserError, match=r"calibration on b.txt: the text has 10 blocks .* use samples: 10"):
        draw("b.txt", 11)
