"""Two models held against each other are what each is by itself, whole or a layer at a time."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import lrc
import lrc.estimate.room
import lrc.evaluation.token_file
from lrc.errors import UserError
from lrc.evaluation.streamed import StreamedModel
from lrc.hub.loader import load_tokenizer
from lrc.run.settings import Run
from lrc.verbs.evaluate import evaluate_against

TEXT = "It was a bright cold day in April, and nobody had counted the words. " * 20


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def both(tiny_checkpoint, tmp_path) -> tuple[Path, Path]:
    """A model with a little noise on its weights, and the model."""
    original, noisy = tiny_checkpoint("llama"), tiny_checkpoint("llama")
    tensors = load_file(noisy / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    tensors = {name: t + 0.03 * torch.randn(t.shape, generator=noise) for name, t in tensors.items()}
    save_file(tensors, noisy / "model.safetensors", metadata={"format": "pt"})
    return noisy, original


def figures(found):
    """All that is measured, without the clock."""
    values = found.as_dict()
    for each in (*values["perplexity"], *values["against"]["perplexity"]):
        assert each.pop("seconds") > 0
        assert each.pop("tokens_per_second") > 0
    return values


def test_is_what_each_is_by_itself_and_what_the_whole_models_say(both, text):
    found = evaluate_against(*both, ppl=str(text), seq_len=[40, 20], run=Run(device="cpu"))
    for folder, side in zip(both, (found.of, found.against), strict=True):
        assert side is not None
        alone = lrc.evaluate(folder, str(text), seq_len=[40, 20], run=lrc.Run(device="cpu"))
        assert [p.nats for p in side.perplexity] == [p.nats for p in alone]
        assert [p.bits_per_byte for p in side.perplexity] == [p.bits_per_byte for p in alone]
    pair = found.pairs[0]
    ids = load_tokenizer(both[0])(TEXT)["input_ids"]
    cut = torch.tensor(ids[: len(ids) // 40 * 40]).view(-1, 40)
    q, p = (lrc.load(f)(cut).logits[:, :-1].detach().double().log_softmax(-1) for f in both)
    kl = (p.exp() * (p - q)).sum(-1)
    assert pair.tokens is not None
    assert pair.tokens.kl_mean.value == pytest.approx(float(kl.mean()), rel=1e-4)
    ranked = kl.flatten().sort().values
    assert pair.tokens.kl_p99.value == pytest.approx(
        float(ranked[math.ceil(0.99 * len(ranked)) - 1]), rel=1e-4
    )
    agree = (q.argmax(-1) == p.argmax(-1)).double().mean()
    assert pair.tokens.top1_agreement.value == pytest.approx(float(agree))
    assert 0 < pair.tokens.top1_agreement.value < 1
    assert pair.tokens.perplexity_ratio.value == pytest.approx(pair.ratio)
    for estimate in vars(pair.tokens).values():
        assert estimate.low < estimate.value < estimate.high


def test_a_model_is_no_distance_from_itself(both, text):
    found = evaluate_against(both[1], both[1], ppl=str(text), seq_len=40, run=Run(device="cpu"))
    tokens = found.pairs[0].tokens
    assert tokens is not None
    figures = [(each.value, each.low, each.high) for each in vars(tokens).values()]
    assert figures == [(1, 1, 1), (0, 0, 0), (0, 0, 0), (1, 1, 1)]


def test_one_window_has_no_interval_and_says_so(both, text):
    found = evaluate_against(*both, ppl=str(text), seq_len=40, max_windows=1, run=Run(device="cpu"))
    tokens = found.pairs[0].tokens
    assert tokens is not None
    assert {(each.low, each.high) for each in vars(tokens).values()} == {(None, None)}
    assert found.notes == [f"{text}: one window is measured, so the figures have no interval"]


def test_the_same_to_the_last_digit_again_and_a_layer_at_a_time(both, text, tmp_path, monkeypatch):
    tables = []
    made = []

    class Seen(StreamedModel):
        def __init__(self, *args, **kwargs):
            made.append(args[0])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr("lrc.evaluation.folder.StreamedModel", Seen)

    def measured():
        kept = tmp_path / f"{len(tables)}.parquet"
        found = evaluate_against(*both, ppl=str(text), seq_len=[40, 24], run=Run(device="cpu"), tokens=kept)
        tables.append(pq.read_table(kept))
        return figures(found)

    first = measured()
    assert measured() == first
    assert not made
    # Room for one of them: neither is loaded whole.
    monkeypatch.setattr(lrc.estimate.room, "free_bytes", lambda device: 100_000)
    assert measured() == first
    assert made == [*both]
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


def test_tokens_are_kept_with_their_place(both, text, tmp_path, monkeypatch):
    monkeypatch.setattr(lrc.evaluation.token_file, "_ROWS", 100)
    kept = tmp_path / "tokens.parquet"
    found = evaluate_against(*both, ppl=str(text), seq_len=[40, 20], run=Run(device="cpu"), tokens=kept)
    table = pq.read_table(kept)
    rows = [row for row in table.to_pylist() if row["seq_len"] == 20]
    ids = load_tokenizer(both[0])(TEXT)["input_ids"]
    assert {row["text"] for row in rows} == {str(text)}
    assert all(row["token"] == ids[20 * row["window"] + row["position"]] for row in rows)
    assert len({(row["window"], row["position"]) for row in rows}) == len(rows) == found.pairs[1].ours.tokens
    assert {row["position"] for row in rows} == set(range(1, 20))
    assert sum(row["nll"] for row in rows) == pytest.approx(found.pairs[1].ours.nats)
    assert sum(row["nll_against"] for row in rows) == pytest.approx(found.pairs[1].theirs.nats)
    tokens = found.pairs[1].tokens
    assert tokens is not None
    assert sum(row["kl"] for row in rows) / len(rows) == pytest.approx(tokens.kl_mean.value)
    assert sum(row["agree"] for row in rows) / len(rows) == pytest.approx(tokens.top1_agreement.value)
    assert pq.ParquetFile(kept).num_row_groups > 10
    assert sorted(p.name for p in tmp_path.iterdir() if "tokens" in p.name) == ["tokens.parquet"]


def test_tokens_of_one_model_are_kept_too(both, text, tmp_path):
    kept = tmp_path / "tokens.parquet"
    (found,) = lrc.evaluate(both[0], str(text), seq_len=40, run=lrc.Run(device="cpu"), tokens=kept)
    table = pq.read_table(kept)
    assert table.column_names == ["text", "seq_len", "window", "position", "token", "nll"]
    assert sum(table["nll"].to_pylist()) == pytest.approx(found.nats)


def test_an_evaluation_that_stops_leaves_no_file_and_the_earlier_one(both, text, tmp_path, monkeypatch):
    kept = tmp_path / "tokens.parquet"
    lrc.evaluate(both[0], str(text), seq_len=40, run=lrc.Run(device="cpu"), tokens=kept)
    earlier = kept.read_bytes()
    monkeypatch.setattr(lrc.evaluation.token_file.pq.ParquetWriter, "write_table", _no_space)
    with pytest.raises(UserError, match=r"tokens\.parquet cannot be written: No space left on device"):
        evaluate_against(*both, ppl=str(text), seq_len=40, run=Run(device="cpu"), tokens=kept)
    assert kept.read_bytes() == earlier
    assert sorted(p.name for p in tmp_path.iterdir() if "tokens" in p.name) == ["tokens.parquet"]


@pytest.mark.parametrize("other", [b"notes", pa.table({"nll": [1.0]})])
def test_a_file_that_is_no_evaluation_s_stays(both, text, tmp_path, other):
    kept = tmp_path / "tokens.parquet"
    kept.write_bytes(other) if isinstance(other, bytes) else pq.write_table(other, kept)
    before = kept.read_bytes()
    with pytest.raises(UserError, match=r"--tokens .*tokens\.parquet exists and was not made by lrc eval"):
        lrc.evaluate(both[0], str(text), seq_len=40, run=lrc.Run(device="cpu"), tokens=kept)
    assert kept.read_bytes() == before


def test_no_text_is_a_mistake(both):
    for measured in (lambda: lrc.evaluate(both[0], []), lambda: evaluate_against(*both, ppl=[])):
        with pytest.raises(
            UserError, match="ppl names no text; name one, such as wikitext2, or leave it out"
        ):
            measured()


def _no_space(*_):
    raise OSError(28, "No space left on device")


def test_other_vocabularies_are_compared_by_perplexity_alone(tiny_checkpoint, text, tmp_path):
    both = tiny_checkpoint("llama"), tiny_checkpoint("llama", vocab_size=300)
    found = evaluate_against(*both, ppl=str(text), seq_len=40, run=Run(device="cpu"))
    (pair,) = found.pairs
    assert pair.tokens is None
    assert pair.ratio_of == "perplexity"
    (note,) = found.notes
    assert note.startswith(f"{text}: the vocabularies have 256 and 300 entries")
    with pytest.raises(UserError, match=r"the vocabularies have 256 and 300 entries.*leave --tokens out"):
        evaluate_against(
            *both, ppl=str(text), seq_len=40, run=Run(device="cpu"), tokens=tmp_path / "t.parquet"
        )
    assert not (tmp_path / "t.parquet").exists()
