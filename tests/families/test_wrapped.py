"""The decoder inside a multimodal checkpoint is compressed alone, and the output is a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import byte_tokenizer
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

import lrc
from lrc.checkpoint.reader import CheckpointReader
from lrc.errors import UserError
from lrc.families import families
from lrc.run.settings import Run
from lrc.walk.stream import ModelStream
from lrc.walk.walk import Walk

CPU = Run(device="cpu")
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def wrapped(tmp_path: Path) -> Path:
    """A tiny Gemma 3 with a vision tower, every parameter random."""
    torch.manual_seed(0)
    text = {**families()["gemma3_text"].tiny, "vocab_size": 256}
    vision = {**VISION, "image_size": 16, "patch_size": 8}
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "wrapped")
    byte_tokenizer(starts=True).save_pretrained(tmp_path / "wrapped")
    return tmp_path / "wrapped"


def test_the_stream_has_the_logits_of_the_whole_model(wrapped: Path) -> None:
    reader, ids = CheckpointReader(wrapped), torch.randint(1, 256, (2, 20))
    assert reader.family.model_type == "gemma3_text"
    stream = ModelStream(reader, torch.device("cpu"), torch.float32)
    batches = stream.embed([ids])
    for visit in Walk(stream, batches):
        visit.observe()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(wrapped, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(stream.tail()(batches[0].hidden), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("without_pages")
def test_the_output_is_a_language_model(wrapped: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April, and nobody had counted. " * 40, encoding="utf-8")
    changes: dict[str, Any] = {"calibration.samples": 8, "calibration.seq_len": 32, "allocate": "uniform"}
    report = lrc.compress(
        wrapped, keep=0.6, changes=changes, out=tmp_path / "out", calib=str(text), ppl=[str(text)], run=CPU
    )
    (warning,) = (each for each in report.warnings if "holds more than a language model" in each)
    assert "only its decoder for text (gemma3_text) is compressed" in warning
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == "Gemma3ForCausalLM"
    (change,) = report.perplexity
    (after,) = lrc.evaluate(tmp_path / "out", str(text), run=CPU)
    assert change.after.value == pytest.approx(after.value, rel=1e-4)


def test_a_decoder_that_lrc_does_not_know_is_named(wrapped: Path) -> None:
    path = wrapped / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["text_config"]["model_type"] = "gemma9_text"
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="is a gemma3, which holds gemma9_text model for text; did you mean"):
        CheckpointReader(wrapped)
