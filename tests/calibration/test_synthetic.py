"""Text that the model writes, against draws from full forward passes without a cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import lrc.calibration.synthetic
from lrc.calibration.synthetic import start_token, synthesize, write_blocks
from lrc.errors import UserError
from lrc.hub.loader import load
from lrc.plan.job import Job, make_job, open_checkpoint
from lrc.plan.library import read_draft
from lrc.run.settings import Run
from lrc.run.stopwatch import Stopwatch
from lrc.text.blocks import ids_sha256, uniforms
from lrc.text.corpus import Source

TinyCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")


def prepare(model: str | Path, plan: str | Path) -> Job:
    """A model and a plan resolved for it."""
    return make_job(*open_checkpoint(model, Run()), read_draft(plan))


def written(model: PreTrainedModel, count: int, seq_len: int, seed: int = 0, batch_size: int = 4) -> Tensor:
    return write_blocks(model, 3, count, seq_len, seed, batch_size, lambda done: None)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tokens_are_where_the_numbers_fall_in_the_full_softmax(
    tiny_checkpoint: TinyCheckpoint, family: str
) -> None:
    model = load(tiny_checkpoint(family))
    for block, ids in enumerate(written(model, 3, 20, seed=5).tolist()):
        for t, number in enumerate(uniforms(5, f"synthetic/{block}", 20).tolist()):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[3, *ids[:t]]]), use_cache=False).logits[0, -1]
            largest = max(logits.tolist())
            weights = [math.exp(x - largest) for x in logits.tolist()]
            below, token = 0.0, -1
            while below <= number * sum(weights):
                token += 1
                below += weights[token]
            assert ids[t] == token


def test_blocks_are_a_function_of_seed_and_number_whatever_the_batch(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load(tiny_checkpoint("llama"))
    state = torch.get_rng_state()
    blocks = written(model, 7, 24)
    for batch_size in (1, 3, 7, 100):
        assert torch.equal(written(model, 7, 24, batch_size=batch_size), blocks)
    assert torch.equal(written(model, 4, 24), blocks[:4])
    assert not torch.equal(written(model, 7, 24, seed=1), blocks)
    assert len({tuple(block) for block in blocks.tolist()}) == 7
    assert torch.equal(state, torch.get_rng_state())


def test_first_tokens_have_the_models_probabilities(tiny_checkpoint: TinyCheckpoint) -> None:
    model, count = load(tiny_checkpoint("gpt2", vocab_size=8)), 4000
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[3]])).logits[0, -1].softmax(-1)
    found = written(model, count, 2, batch_size=count)[:, 0].bincount(minlength=8) / count
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() < 4.5 * deviation).all()


def test_a_text_that_ends_is_followed_by_another(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load(tiny_checkpoint("llama", vocab_size=4))  # 0 ends a text
    blocks = written(model, 4, 60)
    assert (blocks[:, :-1] == 0).any()
    assert blocks.shape == (4, 60)


def test_a_block_may_be_as_long_as_the_model_reads(tiny_checkpoint: TinyCheckpoint) -> None:
    assert written(load(tiny_checkpoint("gpt2")), 1, 64).shape == (1, 64)


def test_logits_that_are_no_numbers_are_told(tiny_checkpoint: TinyCheckpoint) -> None:
    model = load(tiny_checkpoint("llama"))
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = torch.nan
    with pytest.raises(UserError, match="logits are NaN or inf"):
        written(model, 2, 4)


# --- as a source of calibration ---


def source(folder: Path, tmp_path: Path, progress: Any = None) -> Source:
    plan = tmp_path / "plan.yaml"
    plan.write_text("format: 1\nkeep: 0.5\ncalibration: {seq_len: 8, seed: 2}\n", encoding="utf-8")
    watch = Stopwatch(CPU)
    found = synthesize(
        3,
        job=prepare(folder, plan),
        device=CPU,
        dtype=torch.float32,
        run=Run(batch_size=2, progress=progress),
        watch=watch,
    )
    assert list(watch.seconds) == ["generate"]
    return found


def test_a_source_has_its_settings_and_counts_its_steps(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder, told, steps = tiny_checkpoint("gpt2"), [], []

    def progress(stage: str, total: int) -> Callable[[int], None]:
        told.append((stage, total))
        return steps.append

    found = source(folder, tmp_path, progress=progress)
    expected = write_blocks(load(folder), 0, 3, 8, 2, 3, lambda done: None)
    assert torch.equal(found.blocks, expected)
    assert found.label == "synthetic"
    assert found.provenance == {"start": 0, "temperature": 1.0, "ids_sha256": ids_sha256(expected)}
    assert told == [("generate", 16)]
    assert sum(steps) == 16


@pytest.mark.parametrize(
    ("bos", "eos", "start"), [(7, 0, 7), (None, 5, 5), (None, [300, 6], 6), (300, 4, 4), (0, 4, 0)]
)
def test_the_start_is_a_token_of_the_vocabulary(
    tiny_checkpoint: TinyCheckpoint, bos: Any, eos: Any, start: int
) -> None:
    folder = tiny_checkpoint("llama", bos_token_id=bos, eos_token_id=eos)
    assert start_token(prepare(folder, "a3-2x")) == start


def test_no_start_token_is_told(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("gpt2", bos_token_id=None, eos_token_id=None)
    with pytest.raises(UserError, match="names no bos_token_id or eos_token_id among the 256 tokens"):
        start_token(prepare(folder, "a3-2x"))


def test_a_model_that_does_not_fit_says_what_it_needs(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("llama")
    monkeypatch.setattr(lrc.calibration.synthetic, "free_bytes", lambda device: 54_321)
    monkeypatch.delattr(lrc.calibration.synthetic, "load")
    with pytest.raises(UserError) as error:
        source(folder, tmp_path)
    weights = sum(p.numel() for p in load(folder).parameters())
    cache = 2 * 8 * 2 * (2 + 1) * 2 * 8  # blocks, tokens, keys and values, layers and one, heads, width
    logits = 2 * 256 * (4 + 4 * 8)
    assert f"it needs about {4 * (weights + cache) + logits:,} bytes, and 54,321 are free" in str(error.value)
    assert "--calib wikitext2 or a file" in str(error.value)
