"""The default mixture: its proportions, what is left out and why, how others fill up, and what is held out of it."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from zlib import crc32

import datasets
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lrc.errors import UserError
from lrc.text.corpus import Corpus, read_corpus
from lrc.text.datasets import DATASETS, GENERAL_WEIGHTS, MESSAGES
from lrc.text.encoding import Encoded, encode, excerpt, handles
from lrc.text.mixture import Mixture, filled, general_mixture, read_mixture, shares
from lrc.text.source import read_text

SEQ_LEN = 16
STREAMS = [name for name, data_set in DATASETS.items() if data_set.stream]
Corpora = Callable[..., Corpus]


def rows(name: str, count: int) -> list[dict[str, Any]]:
    """Rows of a data set whose every run of characters is its own."""
    numbers = [f"{name} {crc32(f'{name}{n}'.encode()):08x} " * 2 for n in range(count)]
    if DATASETS[name].column == MESSAGES:
        return [{"messages": [{"role": "user", "content": text}]} for text in numbers]
    return [{"text": text} for text in numbers]


@pytest.fixture
def tokenizer(shared_checkpoint) -> PreTrainedTokenizerBase:
    found = AutoTokenizer.from_pretrained(shared_checkpoint("gpt2"))
    found.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with 40 rows of every text of the mixture, and a hub that gives nothing."""

    def unreachable(*names: Any, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for name in GENERAL_WEIGHTS:
        for split in ("train", "validation"):
            files = DATASETS[name].splits[split].local
            path = tmp_path / (files[-1] if name == "c4" else files[0])
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(row) + "\n" for row in rows(name, 40))
            plain = "".join(f"{split} {row['text']}\n" for row in rows(name, 40) if "text" in row)
            text = (plain if path.suffix == ".txt" else lines).encode()
            path.write_bytes(lzma.compress(text) if path.suffix == ".xz" else text)
    return tmp_path


@pytest.fixture
def read(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Corpora:
    def corpus(data: str = "general", samples: Any = "all", **options: Any) -> Corpus:
        mixture = read_mixture(data, options.get("use", "calibration"))
        return read_corpus(mixture, tokenizer, SEQ_LEN, samples, data_dir=folder, **options)

    return corpus


# --- splits of one stream ---


@pytest.mark.parametrize("name", STREAMS)
def test_the_splits_of_a_local_file_share_no_row_and_miss_none(folder: Path, name: str) -> None:
    found = [read_text(f"{name}:{split}", "calibration", folder) for split in ("train", "validation")]
    every = [row.get("text") or json.dumps(row["messages"]) for row in rows(name, 40)]
    parts = [text.text.split("\n" if text.chat else "\n\n") for text in found]
    assert [part for text in parts for part in text] == every
    assert [len(part) for part in parts] == [36, 4]
    assert {text.origin for text in found} == {DATASETS[name].splits["train"].local[0]}


@pytest.mark.parametrize("name", STREAMS)
def test_the_validation_rows_of_the_hub_are_those_after_the_train_rows(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked, column = [], DATASETS[name].column

    def load_dataset(path: str, config: str | None, **options: Any) -> Any:
        asked.append((path, config, options["split"], options["streaming"]))
        content = (f"row {n}" for n in range(5000))
        return ({column: [{"role": "user", "content": c}] if column == MESSAGES else c} for c in content)

    monkeypatch.delenv("LRC_DATA_DIR", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = [read_text(f"{name}:{split}", "calibration") for split in ("train", "validation")]
    texts = [[m[0]["content"] for m in text.chat] if text.chat else text.text.split("\n\n") for text in found]
    assert texts == [[f"row {n}" for n in range(2000)], [f"row {n}" for n in range(2000, 2200)]]
    hub = DATASETS[name].hub
    assert hub is not None
    assert asked == [(hub, DATASETS[name].config, "train", True)] * 2
    assert all(text.origin.startswith(hub) and text.origin.endswith("on the hub") for text in found)


@pytest.mark.parametrize("name", STREAMS)
def test_the_real_files_are_split_without_a_shared_row(data_dir: Path, name: str) -> None:
    if not (data_dir / DATASETS[name].splits["train"].local[0]).is_file():
        pytest.skip(f"no {name} in {data_dir}")
    train, validation = (read_text(f"{name}:{s}", "calibration", data_dir) for s in ("train", "validation"))
    assert train.sha256 != validation.sha256
    assert not {*map(str, train.chat)} & {*map(str, validation.chat)}
    assert len(train.text) > len(validation.text) > 0
    assert not Path(train.origin).is_absolute()


# --- the mixture ---


def test_the_default_mixture_has_its_proportions_and_names_its_origins(read: Corpora) -> None:
    found = read(samples=42).draw(42, 0)
    assert [(s.label.partition(":")[0], len(s.blocks)) for s in found.sources] == [
        ("wikitext2", 9),
        ("wikipedia", 6),
        ("web", 8),
        ("c4", 7),
        ("textbooks", 3),
        ("code", 4),
        ("wikipedia-es", 1),
        ("wikipedia-fr", 1),
        ("chat", 3),
    ]
    record = found.as_dict(0)
    assert (found.data, record["data"], found.notes) == ("general", "general", ())
    assert record["sources"][0]["origin"] == "wikitext2-raw/train.txt"
    assert [s["weight"] for s in record["sources"]] == [*GENERAL_WEIGHTS.values()]


def test_chat_is_left_out_without_a_template_and_is_not_read(
    read: Corpora, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = None
    (folder / DATASETS["chat"].splits["train"].local[0]).unlink()
    found = read().draw(20, 0)
    assert len(found.blocks) == 20
    (note,) = found.notes
    assert "without chat: the tokenizer has no chat template; the other texts take its share" in note


def test_a_language_that_the_tokenizer_does_not_handle_is_left_out_and_another_text_warned_of(
    read: Corpora, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrc.text.encoding._BYTE_LEVEL", 0)
    corpus = read()
    assert {"wikipedia-es", "wikipedia-fr"}.isdisjoint(corpus.mixture.names)
    left, warned = corpus.notes[:2], corpus.notes[2]
    assert all("1.00 bytes a token, below 2" in note for note in (*left, warned))
    assert "without wikipedia-es" in left[0]
    assert "calibration on wikitext2:train" in warned
    assert any("wikipedia-fr:train" in note for note in read("wikipedia-fr").notes)


def test_byte_tokenizers_handle_every_language(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = torch.zeros(10, dtype=torch.int64)
    assert handles(tokenizer, Encoded(ids, 10))
    tokenizer.add_tokens([f"<{n}>" for n in range(1000)])
    assert [handles(tokenizer, Encoded(ids, size)) for size in (19, 20)] == [False, True]


def test_missing_sources_are_left_out_each_with_its_reason(read: Corpora, folder: Path) -> None:
    for name in ("web", "code"):
        (folder / DATASETS[name].splits["train"].local[0]).unlink()
    found = read().draw(20, 0)
    assert [s.label.partition(":")[0] for s in found.sources] == [
        name for name in GENERAL_WEIGHTS if name not in ("web", "code")
    ]
    for name, note in zip(("web", "code"), found.notes, strict=True):
        assert f"general without {name}: " in note
        assert str(folder) not in note
    assert "HuggingFaceFW/fineweb (no route)" in found.notes[0]
    assert "the hub does not answer" in found.notes[1]  # it is asked once


def test_without_any_source_the_error_says_what_to_do(
    tokenizer: PreTrainedTokenizerBase, folder: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError) as error:
        read_corpus(general_mixture(), tokenizer, SEQ_LEN, data_dir=empty)
    assert all(
        word in str(error.value) for word in ("--data-dir", "LRC_DATA_DIR", "--calib FILE", "no route")
    )


def test_a_short_source_gives_all_and_the_others_fill_up(read: Corpora, folder: Path) -> None:
    path = folder / DATASETS["wikitext2"].splits["train"].local[0]
    path.write_text("x" * (2 * SEQ_LEN), encoding="utf-8")
    found = read(samples=42).draw(42, 0)
    counts = [len(s.blocks) for s in found.sources]
    assert (counts[0], sum(counts)) == (2, 42)
    assert counts[1:] == filled(40, general_mixture().fractions[1:], [1000] * 8)
    (note,) = found.notes
    assert "wikitext2:train has 2 blocks, fewer than the 9 of its share; the other texts fill up" in note


def test_more_samples_than_all_texts_have_is_an_error(read: Corpora) -> None:
    with pytest.raises(
        UserError, match=r"calibration on general: .* fewer than the 99999 samples .* use sampl"
    ):
        read(samples=99999).draw(99999, 0)


def test_fewer_samples_than_texts_take_the_heaviest(read: Corpora) -> None:
    found = read(samples=3).draw(3, 0)
    assert [s.label for s in found.sources] == ["wikitext2:train", "web:train", "c4:train"]
    assert "3 blocks are fewer than the texts" in found.notes[0]


@pytest.mark.parametrize("data", ["general=1,c4=1", "general,c4", ["general", "c4"], {"general": 1}])
def test_the_mixture_is_no_part_of_another(data: Any) -> None:
    with pytest.raises(UserError, match=r"general is a mixture, not a part of one; .* wikitext2=2.3,wikip"):
        read_mixture(data)


def test_the_mixture_is_no_text_for_perplexity() -> None:
    with pytest.raises(UserError, match="general, which has no splits, is a mixture"):
        read_text("general", "evaluation")


def test_filling_up_keeps_the_proportions_of_the_others() -> None:
    weights = [Fraction(w) for w in (4, 2, 1, 1)]
    assert filled(80, weights, [100, 100, 100, 100]) == [40, 20, 10, 10]
    assert filled(80, weights, [10, 100, 100, 100]) == [10, 35, 18, 17]
    assert filled(80, weights, [10, 20, 25, 25]) == [10, 20, 25, 25]


def test_long_texts_are_cut_to_stretches_over_their_whole_length(folder: Path) -> None:
    text = read_text("web", "calibration", folder)
    cut = excerpt(text, 320)
    assert excerpt(text, len(text.text)) is text
    assert 200 < len(cut.text) < 400
    assert cut.text.count("web") >= 14
    assert cut.sha256 == text.sha256
    assert 2 < len(excerpt(read_text("chat", "calibration", folder), 400).chat) < 9


# --- held out of it ---


def test_held_out_blocks_are_of_the_validation_splits_in_the_same_proportions(read: Corpora) -> None:
    fitted = read(samples=42).draw(42, 0)
    names = [s.label.partition(":")[0] for s in fitted.sources]
    mixture = general_mixture("held-out", names)
    assert mixture.weights is not None
    assert dict(zip(mixture.names, mixture.weights, strict=True)) == {
        **{name: weight for name, weight in GENERAL_WEIGHTS.items() if name != "c4"},
        "web": 4,
    }
    found = read("general", 12, use="held-out").held_out(12, fitted.blocks)
    counts = {s.label: len(s.blocks) for s in found.sources}
    assert [*counts.values()] == shares(12, mixture.fractions)
    assert counts["web:validation"] == max(counts.values())
    assert min(counts.values()) == 1
    assert all(label.endswith(":validation") for label in counts)


def test_held_out_blocks_share_no_run_with_calibration(
    read: Corpora, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    corpus = read(use="held-out")
    ids = next(part.ids for part in corpus.parts if part.name == "web")
    assert ids is not None
    fitted = ids[: 2 * SEQ_LEN].view(2, SEQ_LEN)
    web = next(s for s in corpus.held_out(16, fitted).sources if s.label == "web:validation")
    assert not any(torch.equal(block, each) for block in web.blocks for each in fitted)
    copied = encode(tokenizer, read_text("web:validation", "held-out", folder)).ids
    found = corpus.held_out(8, copied[: len(copied) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN))
    assert "web:validation" not in [s.label for s in found.sources]
    assert any("without web: no block besides calibration" in note for note in found.notes)


def test_a_mixture_of_the_user_is_held_out_by_weight(read: Corpora) -> None:
    corpus = read("wikipedia=3,code=1", 4, use="held-out")
    found = corpus.held_out(4, torch.full((2, SEQ_LEN), 7))
    assert [(s.label, len(s.blocks)) for s in found.sources] == [
        ("wikipedia:validation", 3),
        ("code:validation", 1),
    ]
    assert found.label == "wikipedia:validation=3,code:validation=1"
    assert isinstance(corpus.mixture, Mixture)
    with pytest.raises(UserError, match="2 sources"):
        read("wikipedia=3,code=1", 1, use="held-out")
    with pytest.raises(UserError, match="synthetic"):
        read("synthetic", 1, use="held-out")
