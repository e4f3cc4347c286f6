"""``resize_token_embeddings`` where the embedding or the head is factorized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import lrc
from lrc.errors import UserError
from lrc.hub.names import ASSETS

TEXTS = "calibration: {samples: 3, seq_len: 32}"
TOKENS = torch.arange(1, 9)[None]


@pytest.fixture(scope="module", params=["tied", "embed", "lm_head", "embed, lm_head"])
def factorized(request: Any, shared_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("resize") / "out"
    tied = request.param == "tied"
    entries = [f"{role}: {{rank: 12}}" for role in ("embed" if tied else request.param).split(", ")]
    plan = f"{{method: svd, keep: 1.0, projections: {{{', '.join(entries)}}}, {TEXTS}}}"
    source = shared_checkpoint("llama", tie_word_embeddings=tied)
    lrc.compress(source, plan, out=out, calib=str(ASSETS / "heldout.txt"), ppl=[])
    return out


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize(
    ("asked", "multiple", "count"), [(260, None, 260), (257, 64, 320), (200, None, 200), (None, 7, 259)]
)
def test_tokens_are_added_and_removed(
    factorized: Path, tmp_path: Path, asked: int | None, multiple: int | None, count: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(factorized)
    before = logits(model)
    embedding = model.resize_token_embeddings(asked, pad_to_multiple_of=multiple)
    assert embedding is model.get_input_embeddings()
    assert embedding.weight.shape == (count, 32)
    assert model.config.vocab_size == count
    after = logits(model)
    shared = min(count, 256)
    torch.testing.assert_close(after[..., :shared], before[..., :shared])
    if count > 256:
        torch.testing.assert_close(after[..., 256], before.mean(-1), rtol=1e-4, atol=1e-5)
    last = torch.tensor([[count - 1, 1, 2]])
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, last), logits(model, last))
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    again(input_ids=TOKENS, labels=TOKENS).loss.backward()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:Model")  # of PEFT
def test_what_cannot_be_resized_is_said(factorized: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(factorized)
    with pytest.raises(UserError, match="leave mean_resizing out"):
        model.resize_token_embeddings(260, mean_resizing=False)
    with pytest.raises(UserError, match="0 tokens"):
        model.resize_token_embeddings(0)
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(UserError, match="before adapters"):
        adapted.resize_token_embeddings(260)
