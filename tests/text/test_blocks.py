"""Windows and calibration blocks, against what lists of ids give."""

from __future__ import annotations

import hashlib
import logging
import struct
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lrc.errors import UserError
from lrc.text.blocks import calibration_blocks, ids_sha256, tokenize, windows


@given(st.integers(1, 200), st.integers(1, 40))
def test_windows_cut_the_ids_in_order_and_drop_the_tail(count, seq_len):
    ids = torch.arange(count)
    if count < seq_len:
        with pytest.raises(UserError, match=f"{count} tokens, fewer than one window of {seq_len}"):
            windows(ids, seq_len)
        return
    cut = windows(ids, seq_len)
    assert cut.flatten().tolist() == list(range(count - count % seq_len))
    assert cut.shape[1] == seq_len


@given(st.integers(2, 30), st.integers(1, 8), st.integers(0, 2**63), st.data())
def test_blocks_are_distinct_blocks_of_the_text_in_order(total, seq_len, seed, data):
    samples = data.draw(st.integers(1, total))
    ids = torch.arange(total * seq_len + seq_len - 1)
    blocks = calibration_blocks(ids, samples, seq_len, seed)
    starts = blocks[:, 0].tolist()
    assert blocks.dtype == torch.int64
    assert len(starts) == samples
    assert starts == sorted(set(starts))
    assert all(start % seq_len == 0 for start in starts)
    assert torch.equal(blocks, torch.tensor(starts)[:, None] + torch.arange(seq_len))
    assert torch.equal(blocks, calibration_blocks(ids, samples, seq_len, seed))


def test_the_seed_chooses_the_blocks_and_leaves_the_global_generator_alone():
    ids = torch.arange(1000)
    state = torch.get_rng_state()
    drawn = {tuple(calibration_blocks(ids, 5, 10, seed)[:, 0].tolist()) for seed in range(20)}
    assert len(drawn) == 20
    assert torch.equal(state, torch.get_rng_state())
    # the draw of seed 0 is part of every checkpoint's reproducibility
    assert calibration_blocks(ids, 5, 10, 0)[:, 0].tolist() == [180, 300, 450, 860, 970]


def test_every_block_is_equally_likely():
    counts = torch.zeros(10)
    for seed in range(400):
        counts[calibration_blocks(torch.arange(10), 3, 1, seed).flatten()] += 1
    assert counts.min() > 80  # 120 expected, deviation 9
    assert counts.max() < 160


def test_all_takes_the_consecutive_blocks():
    assert calibration_blocks(torch.arange(11), "all", 3, 7).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_too_few_blocks_names_both_numbers_and_the_remedies():
    message = "10 blocks of 10 tokens.* 12 samples .*samples: 10, samples: all.* seq_len of at most 8"
    with pytest.raises(UserError, match=message):
        calibration_blocks(torch.arange(100), 12, 10, 0)
    assert len(calibration_blocks(torch.arange(100), 12, 8, 0)) == 12
    with pytest.raises(UserError, match="samples: 0 keeps no block"):
        calibration_blocks(torch.arange(100), 0, 10, 0)


def test_hash_is_of_little_endian_int64():
    ids = [3, 1, 2**40]
    expected = hashlib.sha256(struct.pack("<3q", *ids)).hexdigest()
    assert ids_sha256(torch.tensor(ids)) == expected
    assert ids_sha256(torch.tensor(ids)[None]) == expected


def test_tokenize_gives_the_tokenizers_ids_without_the_length_warning(tiny_checkpoint, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("llama"))
    tokenizer.model_max_length = 4
    text = "naïve café — 漢字\n"
    with caplog.at_level(logging.WARNING, logger="transformers"):
        logging.getLogger("transformers").addHandler(caplog.handler)
        ids = tokenize(tokenizer, text)
        quiet = list(caplog.records)
        reference = tokenizer(text)["input_ids"]
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert ids.tolist() == reference
    assert len(ids) == len(text.encode())
    assert not quiet
    assert any("longer than" in record.getMessage() for record in caplog.records)


def test_a_long_single_line_is_tokenized_in_reasonable_time(tiny_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("llama"))
    text = "the quick brown fox " * 50_000
    start = time.perf_counter()
    assert len(tokenize(tokenizer, text)) == len(text)
    assert time.perf_counter() - start < 30
