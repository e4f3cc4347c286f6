"""A family that needs a first token gets it in every calibration block and every window."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lrc
from lrc.checkpoint.reader import CheckpointReader
from lrc.errors import UserError
from lrc.families import families
from lrc.hub.loader import first_token
from lrc.plan.job import make_job
from lrc.plan.library import read_draft
from lrc.run.settings import Run
from lrc.verbs.setup import set_up

TinyCheckpoint = Callable[..., Path]
STARTING = sorted(name for name, family in families().items() if family.starts_texts)
LENGTH = 24


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(
        "It was a bright cold day in April, and nobody had counted the words. " * 20, encoding="utf-8"
    )
    return path


def test_there_are_such_families() -> None:
    assert STARTING


@pytest.mark.parametrize("family", STARTING)
def test_the_perplexity_is_that_of_a_plain_script(
    tiny_checkpoint: TinyCheckpoint, text: Path, family: str
) -> None:
    folder = tiny_checkpoint(family)
    # By name, as transformers before 5.21 runs gemma2 in sdpa, without its soft caps.
    attention = "sdpa" if CheckpointReader(folder).family.sdpa else "eager"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    losses = []
    for start in range(0, len(ids) - LENGTH + 2, LENGTH - 1):
        window = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + LENGTH - 1]]])
        with torch.no_grad():
            losses.append(model(window, labels=window).loss.double())
    (found,) = lrc.evaluate(folder, str(text), seq_len=LENGTH, run=Run(device="cpu"))
    assert found.windows == len(losses)
    assert found.value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    assert any(f"every window starts with {tokenizer.bos_token} (id 0)" in note for note in found.notes)


@pytest.mark.parametrize("family", ["llama", *STARTING])
def test_calibration_blocks_start_with_it(
    tiny_checkpoint: TinyCheckpoint, text: Path, tmp_path: Path, family: str
) -> None:
    folder, plan = tiny_checkpoint(family), tmp_path / "plan.yaml"
    calibration = f"{{data: {text}, samples: 5, seq_len: {LENGTH}}}"
    plan.write_text(f"format: 1\nkeep: 0.5\ncalibration: {calibration}\n", encoding="utf-8")
    setup = set_up(folder, Run(device="cpu"))
    job = make_job(setup.model, setup.reader, read_draft(plan))
    blocks = setup.texts(job).calibration.blocks
    assert blocks.shape == (5, LENGTH)
    assert bool((blocks[:, 0] == 0).all()) == (family in STARTING)
    assert not bool((blocks[:, 1] == 0).any())


@pytest.mark.parametrize("family", STARTING)
def test_a_tokenizer_without_it_is_refused(tiny_checkpoint: TinyCheckpoint, family: str) -> None:
    folder = tiny_checkpoint(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = None
    with pytest.raises(UserError, match=f"{family} needs its BOS token at the start of every text"):
        first_token(AutoModelForCausalLM.from_pretrained(folder).config, tokenizer)
