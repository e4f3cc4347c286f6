"""A model that runs a layer at a time scores as the whole model does, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lrc.estimate.room
import lrc.evaluation.folder
import lrc.evaluation.perplexity
from lrc.errors import UserError
from lrc.evaluation.perplexity import window_losses
from lrc.evaluation.streamed import StreamedModel
from lrc.families import families
from lrc.hub.loader import load
from lrc.run.settings import Run
from lrc.verbs.compress import compress
from lrc.verbs.evaluate import evaluate

TinyCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")
PLANS = {
    "a3": "keep: 0.6",
    "narrow heads": "keep: 0.6\ncomponents: {qk: {metric: attention}}",
    "pairs": "keep: 0.6\nmethod: svd\nrefit: none",
    "monarch": "keep: 0.6\nmethod: monarch\nrefit: none",
    "tables": "keep: 0.6\nprojections: {embed: {method: svd, rank: 9}}",
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(
        "It was a bright cold day in April, and nobody had counted the words. " * 20, encoding="utf-8"
    )
    return path


@pytest.fixture
def compressed(tiny_checkpoint: TinyCheckpoint, text: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(family: str, body: str, **config: Any) -> Path:
        plan, out = tmp_path / "plan.yaml", tmp_path / "out"
        plan.write_text(f"format: 1\n{body}\ncalibration: {{samples: 4, seq_len: 48}}\n", encoding="utf-8")
        compress(
            tiny_checkpoint(family, **config), plan, out=out, calib=str(text), ppl=[], run=Run(device="cpu")
        )
        return out

    return make


@pytest.fixture(autouse=True)
def two_windows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lrc.evaluation.perplexity, "_CPU_BATCH_TOKENS", 2 * 40)


def scores(folder: Path, dtype: torch.dtype, scratch: Path) -> list[torch.Tensor]:
    """Nats of windows by the whole model and by the streamed one."""
    cut = torch.randint(0, 256, (5, 40), generator=torch.Generator().manual_seed(1))
    models = (load(folder, dtype=dtype), StreamedModel(folder, CPU, dtype, scratch))
    return [window_losses(model, cut) for model in models]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(families()))
def test_scores_are_those_of_the_whole_model(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    whole, streamed = scores(tiny_checkpoint(family, num_hidden_layers=3), dtype, tmp_path)
    assert torch.equal(whole, streamed)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "name"), [*product(["gpt2", "llama"], PLANS), ("phi3", "a3"), ("phi3", "pairs")]
)
def test_scores_of_a_compressed_model_are_too(
    compressed: Callable[..., Path], tmp_path: Path, family: str, name: str, tied: bool
) -> None:
    body = PLANS[name]
    if family != "gpt2" and not tied and "embed" in body:
        body = body.replace("}}", "}, lm_head: {method: svd, keep: 0.5}}")
    folder = compressed(family, body, tie_word_embeddings=tied)
    whole, streamed = scores(folder, torch.float32, tmp_path)
    assert torch.equal(whole, streamed)


def test_a_model_that_does_not_fit_is_streamed(
    tiny_checkpoint: TinyCheckpoint, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = tiny_checkpoint("llama"), []

    class Seen(StreamedModel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(args[0])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(lrc.evaluation.folder, "StreamedModel", Seen)
    (whole,) = evaluate(model, str(text), seq_len=40, run=Run(device="cpu"))
    assert not made
    monkeypatch.setattr(lrc.estimate.room, "free_bytes", lambda device: 100_000)
    (streamed,) = evaluate(model, str(text), seq_len=40, run=Run(device="cpu"))
    assert made == [model]
    assert (streamed.nats, streamed.tokens, streamed.dtype) == (whole.nats, whole.tokens, whole.dtype)
    evaluate(model, str(text), seq_len=40, run=Run(device="cpu"), streamed=False)
    assert len(made) == 1


def test_a_lost_tensor_is_told(compressed: Callable[..., Path], tmp_path: Path) -> None:
    folder = compressed("llama", "keep: 0.6")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks the tensor '{name}'"):
        StreamedModel(folder, CPU, torch.float32, tmp_path)
