"""From a text to token ids, and from ids to the blocks that calibration and evaluation run on."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lrc.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Ids (tokens,) int64 of the whole text, tokenized once; no special tokens but the tokenizer's own."""
    # verbose=False: the ids are cut into windows later, so that they exceed the model's limit says nothing
    encoding = tokenizer(text, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    return torch.tensor(encoding["input_ids"], dtype=torch.int64)


def windows(ids: Tensor, seq_len: int) -> Tensor:
    """Non-overlapping windows (n, seq_len) of ids (tokens,); the tail is dropped.

    Raises UserError where there are fewer ids than one window.
    """
    count = len(ids) // seq_len
    if count == 0:
        raise UserError(
            f"the text has {len(ids)} tokens, fewer than one window of {seq_len}; "
            f"use a longer text or a seq_len of at most {len(ids)}"
        )
    return ids[: count * seq_len].view(count, seq_len)


def calibration_blocks(ids: Tensor, samples: int | Literal["all"], seq_len: int, seed: int) -> Tensor:
    """Blocks (samples, seq_len) drawn without replacement from the consecutive blocks of ids, in text order.

    The draw is a function of the seed alone. Raises UserError where the text holds fewer blocks than asked.
    """
    blocks = windows(ids, seq_len)
    if samples == "all":
        return blocks
    if samples < 1:
        raise UserError(f"samples: {samples} keeps no block; use samples: 1 or more, or samples: all")
    if samples > len(blocks):
        shorter = len(ids) // samples
        remedy = f", or a seq_len of at most {shorter}" if shorter > 1 else ""
        raise UserError(
            f"the text holds {len(blocks)} blocks of {seq_len} tokens, fewer than the {samples} samples "
            f"asked for; use samples: {len(blocks)}, samples: all{remedy}, or a longer text"
        )
    generator = torch.Generator().manual_seed(seed_for(seed, "calibration"))
    chosen = torch.randperm(len(blocks), generator=generator)[:samples]
    return blocks[chosen.sort().values]


def gradient_blocks(blocks: Tensor, samples: int, seed: int) -> Tensor:
    """At most ``samples`` of calibration blocks (n, tokens), for gradients: the first of a draw, in text order.

    The draw is a function of the seed and n alone, so that more samples add blocks and change none.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, "gradient blocks"))
    chosen = torch.randperm(len(blocks), generator=generator)[:samples]
    return blocks[chosen.sort().values]


def batched(blocks: Tensor, size: int) -> list[Tensor]:
    """Blocks (n, tokens), ``size`` at a time; none where there are none."""
    return [*blocks.split(size)] if len(blocks) else []


def uniforms(seed: int, purpose: str, count: int) -> Tensor:
    """Numbers (count,) float64 in [0, 1), a function of seed and purpose alone."""
    generator = torch.Generator().manual_seed(seed_for(seed, purpose))
    return torch.rand(count, dtype=torch.float64, generator=generator)


def ids_sha256(ids: Tensor) -> str:
    """Hash of the ids as little-endian int64, whatever their shape."""
    return hashlib.sha256(ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def seed_for(seed: int, purpose: str) -> int:
    """A generator's seed for one purpose, so that draws for different purposes are independent."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "little")
