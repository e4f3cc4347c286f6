"""Windows of several lengths are of the same text, and no longer than a model can read."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config

from lrc.errors import UserError
from lrc.evaluation.passage import choose_seq_lens, passages
from lrc.text.source import Text


@pytest.fixture
def tokenizer(tiny_checkpoint):
    return AutoTokenizer.from_pretrained(tiny_checkpoint("gpt2"))


def text(name: str, size: int) -> Text:
    return Text(name, None, "".join(chr(97 + i * i % 26) for i in range(size)), "", "")


def test_all_lengths_are_of_the_same_tokens(tokenizer):
    found = passages(tokenizer, [text("one", 150), text("two", 70)], (16, 8, 32))
    assert [(p.data, p.seq_len, len(p.cut)) for p in found] == [
        ("one", 16, 8),
        ("one", 8, 16),
        ("one", 32, 4),
        ("two", 16, 4),
        ("two", 8, 8),
        ("two", 32, 2),
    ]
    for passage in found:
        assert torch.equal(passage.cut.flatten(), passage.ids[: passage.cut.numel()])
    assert len(found[0].ids) == 150


def test_a_number_of_windows_counts_the_longest(tokenizer):
    found = passages(tokenizer, [text("one", 150)], (8, 32), max_windows=2)
    assert [len(p.cut) for p in found] == [8, 2]


def test_a_text_shorter_than_the_longest_is_told(tokenizer):
    with pytest.raises(UserError, match="one: the text has 30 tokens, fewer than one window of 32"):
        passages(tokenizer, [text("one", 30)], (8, 32))


def test_lengths_are_bounded_by_the_shorter_model():
    models = [("long", GPT2Config(n_positions=64)), ("short", GPT2Config(n_positions=32))]
    assert choose_seq_lens(models, None) == (32,)
    assert choose_seq_lens(models, (32, 8)) == (32, 8)
    with pytest.raises(
        UserError, match=r"^--seq-len 48 is longer than the 32 positions of short; use 32 or less$"
    ):
        choose_seq_lens(models, 48)
    told = "--context 8,48: 48 is longer than the 32 positions of short; use 32 or less"
    with pytest.raises(UserError, match=f"^{told}$"):
        choose_seq_lens(models, [8, 48])
    with pytest.raises(UserError, match=r"--context 8,8: .* such as 512,1024,2048"):
        choose_seq_lens(models, [8, 8])
    with pytest.raises(UserError, match=r"--context .* such as 512,1024,2048"):
        choose_seq_lens(models, [])
