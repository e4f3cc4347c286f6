"""Perplexity against a naive float64 loop over single windows, and the invariants of its protocol."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrc.errors import UserError
from lrc.evaluation import perplexity as module
from lrc.evaluation import tokens
from lrc.evaluation.folder import Loading, evaluate_folder
from lrc.evaluation.passage import Passage, choose_seq_lens
from lrc.evaluation.perplexity import (
    PROTOCOL_VERSION,
    count_scored_bytes,
    measure,
    window_losses,
)
from lrc.evaluation.tokens import token_nll
from lrc.run.settings import Run
from lrc.text.blocks import ids_sha256, tokenize, windows
from lrc.text.source import read_text

CPU = torch.device("cpu")
IDS = torch.randint(256, (333,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=["gpt2", "llama"])
def folder(request, tiny_checkpoint):
    return tiny_checkpoint(request.param)


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def perplexity(model, ids, *, data="ids", seq_len=None, max_windows=None, **options):
    (length,) = choose_seq_lens([("the model", model.config)], seq_len)
    return measure(model, Passage(data, ids, windows(ids, length)[:max_windows]), **options)


def naive_nats(model, ids, seq_len):
    """Each window by itself in float64, each token's probability written out."""
    double = type(model)(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    nats = []
    for start in range(0, len(ids) - seq_len + 1, seq_len):
        window = ids[start : start + seq_len]
        with torch.no_grad():
            logits = double(window[None]).logits[0]
        for position in range(1, seq_len):
            scores = logits[position - 1].exp()
            nats.append(-math.log(scores[window[position]].item() / scores.sum().item()))
    return nats


def test_agrees_with_a_naive_float64_loop(model):
    nats = naive_nats(model, IDS, 20)
    result = perplexity(model, IDS, seq_len=20, data="some")
    assert result.tokens == len(nats) == 16 * 19
    assert result.nats == pytest.approx(sum(nats), rel=1e-6)
    assert result.value == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)
    assert (result.ids, result.windows, result.seq_len) == (333, 16, 20)
    assert (result.data, result.dtype, result.protocol) == ("some", "float32", PROTOCOL_VERSION)
    assert result.ids_sha256 == ids_sha256(IDS)
    assert result.bits_per_byte is None
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)


def test_each_token_but_the_windows_first_is_scored_once(model):
    """A head that ignores its input gives every token a known loss: the sum says which tokens were scored."""
    costs = torch.arange(256, dtype=torch.float32) / 100
    model.get_output_embeddings().weight.data.zero_()
    model.get_output_embeddings().register_forward_hook(lambda *_: -costs.expand(*_[2].shape).clone())
    constant = torch.logsumexp(-costs.double(), 0)
    scored = windows(IDS, 20)[:, 1:]
    expected = (costs.double()[scored] + constant).float()
    torch.testing.assert_close(window_losses(model, windows(IDS, 20)), expected, rtol=1e-6, atol=0)


def test_batch_and_chunk_sizes_do_not_change_it(model, monkeypatch):
    whole = perplexity(model, IDS, seq_len=16)
    for batch in (1, 3, 100):
        monkeypatch.setattr(module, "_CPU_BATCH_TOKENS", 16 * batch)
        losses = window_losses(model, windows(IDS, 16))
        assert float(losses.double().sum()) == pytest.approx(whole.nats, rel=1e-6)
    monkeypatch.setattr(tokens, "_CHUNK_BYTES", 4 * 256 * 7)  # 15 rows to score, 7 at once
    assert perplexity(model, IDS, seq_len=16).nats == pytest.approx(whole.nats, rel=1e-6)


def test_the_batch_keeps_the_logits_within_bounds(model, monkeypatch):
    sizes = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr(module, "_LOGIT_BYTES", 5 * 16 * 256 * 4 + 1)
    perplexity(model, IDS, seq_len=16)
    assert sizes == [5, 5, 5, 5]
    sizes.clear()
    monkeypatch.setattr(module, "_LOGIT_BYTES", 1)
    perplexity(model, IDS, seq_len=16, max_windows=2)
    assert sizes == [1, 1]


def test_max_windows_takes_the_first(model):
    part = perplexity(model, IDS, seq_len=16, max_windows=3)
    same = perplexity(model, IDS[:50], seq_len=16)
    assert part.windows == same.windows == 3
    assert part.value == same.value
    assert part.ids == 333
    assert perplexity(model, IDS, seq_len=16, max_windows=10_000).windows == 20


def test_progress_counts_every_window(model, monkeypatch):
    done = []
    monkeypatch.setattr(module, "_CPU_BATCH_TOKENS", 6 * 16)
    window_losses(model, windows(IDS, 16), done.append)
    assert done == [6, 6, 6, 2]


def test_dropout_is_off_and_the_mode_comes_back(model):
    quiet = perplexity(model, IDS, seq_len=16).nats
    model.train()
    assert perplexity(model, IDS, seq_len=16).nats == quiet
    assert model.training


def test_low_precision_logits_are_scored_in_float32(model):
    logits = torch.randn(2, 5, 256).bfloat16()
    ids = torch.randint(256, (2, 5))
    expected = -logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(token_nll(logits, ids), expected.float(), rtol=1e-6, atol=0)
    result = perplexity(model.bfloat16(), IDS, seq_len=16)
    assert result.dtype == "bfloat16"


def test_a_diverged_model_is_reported_as_it_is(model):
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, out: out * 1e6)
    assert perplexity(model, IDS, seq_len=16).value == math.inf
    head.register_forward_hook(lambda _, __, out: out * math.nan)
    result = perplexity(model, IDS, seq_len=16)
    assert math.isnan(result.value)
    assert math.isnan(result.nats)


def test_the_window_is_bounded_by_the_model(model):
    ids = IDS.repeat(3)
    assert perplexity(model, ids).seq_len == 64
    model.config.max_position_embeddings = 32
    assert perplexity(model, ids).seq_len == 32
    with pytest.raises(UserError, match="--seq-len 33 is longer than the 32 positions of the model"):
        perplexity(model, ids, seq_len=33)
    with pytest.raises(UserError, match="--seq-len 1 leaves no token to score"):
        perplexity(model, ids, seq_len=1)
    with pytest.raises(UserError, match="the text has 31 tokens, fewer than one window of 32"):
        perplexity(model, ids[:31])
    model.config.max_position_embeddings = 100_000
    assert choose_seq_lens([("the model", model.config)], None) == (2048,)


def test_bits_per_byte_of_a_byte_tokenizer_are_bits_per_token(folder, model):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "It was the best of times, it was the worst of times. " * 5
    ids = tokenize(tokenizer, text)
    result = perplexity(model, ids, seq_len=16, tokenizer=tokenizer)
    assert result.bits_per_byte == pytest.approx(result.nats / math.log(2) / result.tokens, rel=1e-12)


def test_bytes_scored_add_up_to_the_text(tiny_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("llama"))
    text = "spaces ,  stay . <unk> and so do é and 漢 "
    ids = tokenize(tokenizer, text)
    assert count_scored_bytes(tokenizer, ids[None]) == len(text.encode()) - 1


def test_texts_are_read_tokenized_and_scored_by_name(folder, model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "ptb.test.txt").write_text(" no it was n't black monday \n" * 20)
    plain = tmp_path / "mine.txt"
    plain.write_text("Call me Ishmael. " * 10)
    asked, done = [], []

    def progress(label, count):
        asked.append((label, count))
        return done.append

    loading = Loading(CPU, torch.float32, tmp_path, Run(data_dir=tmp_path, progress=progress))
    texts = [read_text(spec, "evaluation", tmp_path) for spec in ("ptb", str(plain))]
    first, second = evaluate_folder(folder, texts, loading, seq_len=32, max_windows=None)
    text = "\n\n".join(["no it was n't black monday"] * 20)
    alone = perplexity(model, tokenize(tokenizer, text), data="ptb:test", seq_len=32, tokenizer=tokenizer)
    clock = {"seconds": 0.0, "tokens_per_second": 0.0}
    assert dataclasses.replace(first, **clock) == dataclasses.replace(alone, **clock)
    assert (second.data, second.ids, second.windows) == (str(plain), 170, 5)
    assert asked == [("load", 1), ("ptb:test", len(text) // 32), (str(plain), 5)]
    assert sum(done) == 1 + first.windows + second.windows


def test_a_bad_text_is_refused_before_the_model_runs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lrc.evaluation.folder.measure", lambda *_: pytest.fail("the model ran"))
    (tmp_path / "long.txt").write_text("word " * 50)
    (tmp_path / "short.txt").write_text("word")
    texts = [read_text(str(tmp_path / name), "evaluation") for name in ("long.txt", "short.txt")]
    with pytest.raises(UserError, match=r"short\.txt: the text has 4 tokens, fewer than one window of 64"):
        evaluate_folder(folder, texts, Loading(CPU, torch.float32, tmp_path), max_windows=None)


def test_smollm2_cuts_wikitext_as_published(data_dir):
    folder = Path(os.environ.get("LRC_SMOLLM2", ""))
    if not os.environ.get("LRC_SMOLLM2") or not (folder / "tokenizer.json").is_file():
        pytest.skip("LRC_SMOLLM2 does not name a folder with SmolLM2's tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = read_text("wikitext2", "evaluation", data_dir)
    ids = tokenize(tokenizer, text.text)
    cut = windows(ids, 2048)
    assert (len(ids), len(cut), len(cut) * 2047) == (304_986, 148, 302_956)
    last = len(tokenizer.decode(ids[cut.numel() :], clean_up_tokenization_spaces=False).encode())
    firsts = sum(len(tokenizer.decode(first).encode()) for first in cut[:, :1].tolist())
    assert count_scored_bytes(tokenizer, cut) == pytest.approx(
        len(text.text.encode()) - last - firsts, abs=20
    )
