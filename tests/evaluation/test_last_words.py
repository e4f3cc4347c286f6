"""Last words are scored as each model scores them alone, and as lm-evaluation-harness cuts them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from lrc.evaluation.last_words import FILES, PASSAGES, LastWords, find_passages, last_words
from lrc.evaluation.streamed import StreamedModel
from lrc.hub.loader import load, load_tokenizer

TinyCheckpoint = Callable[..., Path]
TEXTS = (
    "They ran to the old mill and hid.",
    "a b",
    "Größe hat\n\nihren Preis",
    "One.",
    "It was the end of it all",
)


def alone(folder: Path, text: str) -> tuple[float, bool]:
    """The loss of the last word and whether it is the most likely one, by transformers, of one text at a time."""
    model, tokenizer = load(folder), load_tokenizer(folder)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    start = len(tokenizer(text.rpartition(" ")[0])["input_ids"])
    with torch.no_grad():
        scores = model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(-1)
    word = ids[0, start:]
    nats = -scores.gather(-1, word[:, None]).sum().item()
    return nats, bool((scores.argmax(-1) == word).all())


def found(folders: tuple[Path, Path], texts: tuple[str, ...] = TEXTS) -> LastWords:
    words = last_words([load(f) for f in folders], load_tokenizer(folders[0]), texts)
    assert words is not None
    return words


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_passage_counts_as_alone(tiny_checkpoint: TinyCheckpoint, family: str) -> None:
    ours, theirs = tiny_checkpoint(family), tiny_checkpoint(family, seed=1)
    words, with_words = found((ours, theirs)), [text for text in TEXTS if " " in text]
    after, before = ([alone(folder, text) for text in with_words] for folder in (ours, theirs))
    assert (words.asked, words.passages) == (len(TEXTS), len(with_words))
    for value, each in ((words.perplexity_after, after), (words.perplexity_before, before)):
        mean = torch.tensor([nats for nats, _ in each], dtype=torch.float64).mean()
        assert value == pytest.approx(mean.exp().item(), rel=1e-4)
    assert words.perplexity_ratio.value == pytest.approx(words.perplexity_after / words.perplexity_before)
    assert words.perplexity_ratio.low is not None
    assert words.perplexity_ratio.low <= words.perplexity_ratio.value
    shares = [sum(right for _, right in each) / len(each) for each in (before, after)]
    assert [words.accuracy_before, words.accuracy_after] == shares
    assert words.accuracy_change.value == shares[1] - shares[0]


def test_a_word_that_the_model_would_write_is_right(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama", tie_word_embeddings=False)
    model, tokenizer = load(folder), load_tokenizer(folder)
    with torch.no_grad():  # whatever comes before, a space is the most likely token, and after it an x
        model.lm_head.weight.zero_()
        ids = torch.tensor([tokenizer("They say x")["input_ids"]])
        states = model.model(input_ids=ids).last_hidden_state[0]
        space, letter = ids[0, -2:]
        model.lm_head.weight[space], model.lm_head.weight[letter] = states[-3], states[-2]
        wanted = model(input_ids=ids).logits[0, -3:-1].argmax(-1)
    assert wanted.tolist() == [space, letter]
    words = last_words([model, load(folder)], tokenizer, ["They say x", "They say y"])
    assert words is not None
    assert (words.accuracy_before, words.accuracy_after) == (0, 0.5)
    assert words.accuracy_change.value == 0.5


def test_streamed_models_give_the_same(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    ours, theirs = tiny_checkpoint("llama"), tiny_checkpoint("llama", seed=1)
    streamed = [StreamedModel(f, torch.device("cpu"), None, tmp_path) for f in (ours, theirs)]
    words = last_words(streamed, load_tokenizer(ours), TEXTS)
    assert words is not None
    assert words.perplexity_after == pytest.approx(found((ours, theirs)).perplexity_after, rel=1e-6)


def test_of_a_long_passage_the_end_counts(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama", max_position_embeddings=16)
    long, short = "so they say " + 9 * "x" + " and hid.", 7 * "x" + " and hid."
    assert len(short) == 16
    assert found((folder, folder), (long,)) == found((folder, folder), (short,))


def test_no_words_give_no_figures(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama")
    assert last_words([load(folder)] * 2, load_tokenizer(folder), ["One.", "Größe", ""]) is None
    few = tiny_checkpoint("llama", vocab_size=64)  # the tokenizer has 256
    assert last_words([load(few)] * 2, load_tokenizer(few), TEXTS) is None


def test_the_first_passages_of_the_file_at_hand(tmp_path: Path) -> None:
    assert find_passages(tmp_path) == []
    path = tmp_path / FILES[0]
    path.parent.mkdir()
    rows = [f"passage {i}\n\nends here" for i in range(PASSAGES + 1)]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": row}) + "\n" for row in rows)
    assert find_passages(tmp_path) == rows[:-1]


def start_every_text(tokenizer: Any) -> None:
    """Let a tokenizer write the token 0 in front of every text."""
    token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.bos_token = token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, 0)]
    )


@pytest.mark.parametrize("marked", [False, True])
def test_scored_as_the_harness_scores(tiny_checkpoint: TinyCheckpoint, marked: bool) -> None:
    from lm_eval.models.huggingface import HFLM

    folder = tiny_checkpoint("llama")
    model, tokenizer, harness = load(folder), load_tokenizer(folder), cast(Any, HFLM)
    if marked:
        start_every_text(tokenizer)
    assert (tokenizer("a")["input_ids"][0] == 0) == marked
    wrapped = harness(pretrained=model, tokenizer=tokenizer, batch_size=1, prefix_token_id=0)
    texts = [text for text in TEXTS if " " in text]
    split = [(text.rpartition(" ")[0], f" {text.rpartition(' ')[2]}") for text in texts]
    requests = [(each, *wrapped._encode_pair(*each)) for each in split]
    scored = wrapped._loglikelihood_tokens(requests, disable_tqdm=True)
    words = last_words([model] * 2, tokenizer, texts)
    assert words is not None
    mean = torch.tensor([-score for score, _ in scored], dtype=torch.float64).mean()
    assert words.perplexity_after == pytest.approx(mean.exp().item(), rel=1e-4)
    assert words.accuracy_after == sum(right for _, right in scored) / len(texts)


def test_a_cut_passage_keeps_the_token_that_starts_a_text(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama", max_position_embeddings=17)
    model, tokenizer = load(folder), load_tokenizer(folder)
    start_every_text(tokenizer)
    long, short = ("so they say " + 9 * "x" + " and hid.", 7 * "x" + " and hid.")
    found = [last_words([model] * 2, tokenizer, [text]) for text in (long, short)]
    assert found[0] == found[1] is not None
