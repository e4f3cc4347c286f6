"""What tests of inspections share: a text of four blocks, inspections of it and outputs fitted to it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lrc.records.inspection import Inspected, Inspection
from lrc.run.settings import Run
from lrc.verbs.compress import compress
from lrc.verbs.inspect import inspect_model

PRINTABLE = [chr(code) for code in range(33, 127)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of 4 x 32 printable characters, each a token."""
    drawn = random.Random(3).choices(PRINTABLE, k=128)
    path = tmp_path / "drawn.txt"
    path.write_text("".join(drawn), encoding="utf-8")
    return path


@pytest.fixture
def blocks(text: Path) -> Tensor:
    """The same as ids (4, 32)."""
    from tokenizers import pre_tokenizers

    ids = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return torch.tensor([ids[char] for char in text.read_text(encoding="utf-8")]).view(4, 32)


@pytest.fixture
def inspected(text: Path) -> Callable[..., Inspection]:
    """Inspects a checkpoint on the four blocks, two at a time."""

    def inspect(folder: Path, **options: object) -> Inspection:
        run = Run(device="cpu", batch_size=2)
        settings = {"samples": 4, "seq_len": 32, "run": run} | options
        return inspect_model(folder, calib=str(text), **settings)  # type: ignore[arg-type]

    return inspect


@pytest.fixture
def output(text: Path, tmp_path: Path, without_pages: None) -> Callable[..., Path]:
    """Compresses a checkpoint by a plan on the same blocks."""

    def make(folder: Path, plan: str, name: str = "out") -> Path:
        written = tmp_path / f"{name}.yaml"
        calibration = "calibration: {samples: 4, seq_len: 32, gradient_samples: 4}"
        written.write_text(f"format: 1\n{calibration}\n{plan}\n", encoding="utf-8")
        compress(
            folder, written, out=tmp_path / name, calib=str(text), ppl=(), run=Run(device="cpu", batch_size=2)
        )
        return tmp_path / name

    return make


@pytest.fixture
def find() -> Callable[..., Inspected]:
    """Finds a target of a layer in an inspection."""

    def one(found: Inspection, layer: int | None, target: str) -> Inspected:
        return next(each for each in found.targets if (each.layer, each.target) == (layer, target))

    return one


@pytest.fixture
def weights() -> Callable[..., dict[str, Tensor]]:
    """Gives a layer's projections (out, in) and biases of a tiny checkpoint in float64, by role, as saved."""
    return layer_weights


def layer_weights(folder: Path, layer: int) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors = {name: t.double() for name, t in load_file(folder / "model.safetensors").items()}
    start = f"transformer.h.{layer}."
    if f"{start}attn.c_attn.weight" not in tensors:
        start = f"model.layers.{layer}."
        names = {r: f"self_attn.{r}_proj" for r in "qkvo"}
        names |= {r: f"mlp.{r}_proj" for r in ("gate", "up", "down")}
        return {role: tensors[f"{start}{name}.weight"] for role, name in names.items()}
    found = {}
    for i, role in enumerate("qkv"):
        found[role] = tensors[f"{start}attn.c_attn.weight"].T.chunk(3)[i]
        found[f"{role}.bias"] = tensors[f"{start}attn.c_attn.bias"].chunk(3)[i]
    for role, name in (("o", "attn.c_proj"), ("fc_in", "mlp.c_fc"), ("fc_out", "mlp.c_proj")):
        found[role] = tensors[f"{start}{name}.weight"].T
        found[f"{role}.bias"] = tensors[f"{start}{name}.bias"]
    return found
