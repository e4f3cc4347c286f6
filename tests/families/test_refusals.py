"""What lrc cannot do with a family is refused with the reason, before any weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lrc
from lrc.checkpoint.reader import CheckpointReader
from lrc.errors import UserError
from lrc.run.settings import Run

TinyCheckpoint = Callable[..., Path]
CPU = Run(device="cpu")


@pytest.fixture
def refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Callable[..., str]:
    """Gives the message that refuses a plan's text for a family."""

    def message(family: str, body: str, **config: Any) -> str:
        plan = tmp_path / "plan.yaml"
        plan.write_text(f"format: 1\n{body}\n", encoding="utf-8")
        with pytest.raises(UserError) as raised:
            lrc.check(tiny_checkpoint(family, **config), plan)
        return str(raised.value)

    return message


def test_heads_that_cannot_be_narrowed(refused: Callable[..., str]) -> None:
    message = refused("qwen3", "keep: 0.5\ncomponents: {qk: {metric: attention}}")
    reason = "heads of q and k of qwen3 cannot be narrowed: a norm over each head reads all their dimensions"
    assert f"components.qk: {reason}; write q and k under projections" in message


def test_a_scale_in_front_of_a_soft_cap(refused: Callable[..., str]) -> None:
    message = refused("gemma2", "keep: 0.5\nscale: logits")
    assert "scale: logits is not for this model: gemma2 caps its logits" in message
    assert "the nearest is none" in message


def test_a_scale_that_nobody_asked_for_is_left_out_with_a_word(tiny_checkpoint: TinyCheckpoint) -> None:
    source, plan = tiny_checkpoint("gemma2"), lrc.Plan(keep=0.5)
    (warning,) = (each for each in lrc.check(source, plan).warnings if "scale" in each)
    assert "is left out: gemma2 caps its logits" in warning


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_layer_norm_before": False}, "do_layer_norm_before=False"),
        ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False"),
        ({"word_embed_proj_dim": 16}, "word_embed_proj_dim=16 beside hidden_size=32"),
    ],
)
def test_opt_models_of_another_kind(tiny_checkpoint: TinyCheckpoint, config: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"opt is not supported with {message}"):
        _ = CheckpointReader(tiny_checkpoint("opt", **config)).architecture


def test_inspecting_heads_that_cannot_be_narrowed(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(UserError, match="--targets qk: its heads cannot be narrowed: a norm over each head"):
        lrc.inspect_model(tiny_checkpoint("qwen3"), targets=["qk"], run=CPU)


def test_a_cache_shrinks_by_its_values_alone(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("It was a bright cold day in April, and nobody had counted. " * 200, encoding="utf-8")
    other.write_text("Call me by another name, said the whale to the sailor. " * 200, encoding="utf-8")
    out = tmp_path / "plan.yaml"
    measuring = lrc.Measuring(held_out=str(other))
    source = tiny_checkpoint("qwen3")
    lrc.make_plan(source, kv_cache=0.8, calib=str(text), measuring=measuring, out=out, run=CPU)
    written = out.read_text(encoding="utf-8")
    assert "ov" in written
    assert "qk" not in written
