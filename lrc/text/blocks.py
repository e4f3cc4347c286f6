"""Turn a text into token ids, and ids into the blocks that calibration and evaluation run on."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lrc.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RUN = 64  # tokens in a row that two unrelated texts do not share
_BASE = 0x1E3779B97F4A7C15  # odd
_INVERSE = (pow(_BASE, -1, 2**64) + 2**63) % 2**64 - 2**63


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, rows: int | None = None, first: int | None = None
) -> Tensor:
    """Tokenize a whole text at once into ids (tokens,), int64; special tokens are the tokenizer's own.

    A token ``first`` at the start is left out, as ``windows`` puts it before every window. Raises UserError for an id
    beyond the ``rows`` of the model's embedding.
    """
    # verbose=False: no warning about the model's limit, as the ids are cut into windows later
    encoding = tokenizer(text, return_attention_mask=False, return_token_type_ids=False, verbose=False)
    ids = torch.tensor(encoding["input_ids"], dtype=torch.int64)
    ids = ids[1:] if first is not None and ids[:1].tolist() == [first] else ids
    if rows is not None:
        check_ids(tokenizer, ids, rows)
    return ids


def check_ids(tokenizer: PreTrainedTokenizerBase, ids: Tensor, rows: int) -> None:
    """Raise UserError if ids exceed the ``rows`` of a model's embedding."""
    if ids.numel() and (largest := int(ids.max())) >= rows:
        first = int(ids[ids >= rows][0])
        token, more = tokenizer.convert_ids_to_tokens(first), int((ids >= rows).sum())
        raise UserError(
            f"the tokenizer gives the token {token!r} the id {first}, but the model's embedding has {rows} rows, ids 0 "
            f"to {rows - 1} ({more} of {ids.numel()} tokens are beyond it, up to id {largest}); use the tokenizer "
            "that the model was trained with, or a text without these tokens"
        )


def windows(ids: Tensor, seq_len: int, first: int | None = None) -> Tensor:
    """Cut ids (tokens,) into non-overlapping windows (n, seq_len); drop the tail.

    With ``first``, each window is this token and ``seq_len`` − 1 of the ids. Raises UserError if the ids do not fill
    one window.
    """
    if first is not None:
        cut = windows(ids, seq_len - 1)
        return torch.cat([torch.full_like(cut[:, :1], first), cut], dim=1)
    count = len(ids) // seq_len
    if count == 0:
        raise UserError(
            f"the text has {len(ids)} tokens, fewer than one window of {seq_len}; "
            f"use a longer text or a seq_len of at most {len(ids)}"
        )
    return ids[: count * seq_len].view(count, seq_len)


def calibration_blocks(
    ids: Tensor, samples: int | Literal["all"], seq_len: int, seed: int, first: int | None = None
) -> Tensor:
    """Draw blocks (samples, seq_len) without replacement from the windows of ids; return them in text order.

    The draw depends on the seed and the number of windows. Raises UserError if there are fewer windows than samples.
    """
    blocks = windows(ids, seq_len, first)
    if samples == "all":
        return blocks
    if samples < 1:
        raise UserError(f"samples: {samples} keeps no block; use samples: 1 or more, or samples: all")
    if samples > len(blocks):
        shorter = len(ids) // samples
        remedy = f", or a seq_len of at most {shorter}" if shorter > 1 else ""
        raise UserError(
            f"the text has {len(blocks)} blocks of {seq_len} tokens, fewer than the {samples} samples "
            f"asked for; use samples: {len(blocks)}, samples: all{remedy}, or a longer text"
        )
    return _drawn(blocks, samples, seed_for(seed, "calibration"))


def gradient_blocks(blocks: Tensor, samples: int, seed: int) -> Tensor:
    """Draw at most ``samples`` of the calibration blocks (n, tokens) for gradients; return them in text order.

    The draw depends only on the seed and n, and a larger number of samples contains the blocks of a smaller one.
    """
    return _drawn(blocks, samples, seed_for(seed, "gradient blocks"))


def held_out_blocks(ids: Tensor, count: int, fitted: Tensor, first: int | None = None) -> Tensor:
    """Return the first ``count`` blocks (count, tokens) of ids (n,) that are not among ``fitted`` (m, tokens).

    Raises UserError if there are fewer, or if one shares a run of tokens with the fitted blocks: 64 tokens, or half a
    block if that is shorter.
    """
    seq_len = fitted.shape[1]
    blocks = windows(ids, seq_len, first)
    left = blocks[~torch.isin(_hashes(blocks, seq_len, seq_len), _hashes(fitted, seq_len, seq_len)).flatten()]
    if count > len(left):
        drawn = len(blocks) - len(left)
        because = f" besides the {drawn} of calibration" if drawn else ""
        remedy = f"use {len(left)}, or " if len(left) else ""
        raise UserError(
            f"it has {len(left)} blocks of {seq_len} tokens{because}, fewer than the {count} held-out samples "
            f"asked for; {remedy}another text"
        )
    chosen, run = left[:count], min(_RUN, seq_len // 2)
    shared = _overlapping(chosen, fitted)
    if shared.any():
        numbers = ", ".join(str(int(n)) for n in shared.nonzero()[:5])
        raise UserError(
            f"it overlaps the calibration blocks (held-out block {numbers} shares {run} tokens in a row), so a loss "
            "measured on it would be too low; use another text"
        )
    return chosen


def unshared_blocks(ids: Tensor, fitted: Tensor, first: int | None = None) -> Tensor:
    """Return the blocks (n, tokens) of ids that share no run of tokens with ``fitted``, as ``held_out_blocks`` says."""
    blocks = windows(ids, fitted.shape[1], first)
    return blocks[~_overlapping(blocks, fitted)]


def batched(blocks: Tensor, size: int) -> list[Tensor]:
    """Split blocks (n, tokens) into batches of ``size``; no batch if n is 0."""
    return [*blocks.split(size)] if len(blocks) else []


def uniforms(seed: int, purpose: str, count: int) -> Tensor:
    """Draw numbers (count,), float64, uniform in [0, 1), that depend only on seed and purpose."""
    generator = torch.Generator().manual_seed(seed_for(seed, purpose))
    return torch.rand(count, dtype=torch.float64, generator=generator)


def ids_sha256(ids: Tensor) -> str:
    """Return the SHA-256 of the ids as little-endian int64; their shape does not count."""
    return hashlib.sha256(ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def seed_for(seed: int, purpose: str) -> int:
    """Derive a generator's seed for one purpose, so that draws for different purposes are independent."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "little")


def _drawn(blocks: Tensor, samples: int, seed: int) -> Tensor:
    chosen = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:samples]
    return blocks[chosen.sort().values]


def _overlapping(blocks: Tensor, fitted: Tensor) -> Tensor:
    """Return which blocks (n, tokens) share a run of tokens with the fitted blocks: (n,), bool."""
    run = min(_RUN, fitted.shape[1] // 2)
    return torch.isin(_hashes(blocks, run, 1), _hashes(fitted, run, 1)).any(dim=1)


def _hashes(blocks: Tensor, run: int, stride: int) -> Tensor:
    """Return a 64-bit hash of every run of ``run`` tokens in each block, ``stride`` apart: (blocks, runs)."""
    # A polynomial in an odd base, modulo 2**64, whose inverse powers shift every run to its start.
    mixed = blocks * _BASE
    mixed = (mixed ^ (mixed >> 31)) * _BASE
    powers, inverses = (
        torch.full((blocks.shape[1],), base, dtype=torch.int64).cumprod(0) for base in (_BASE, _INVERSE)
    )
    sums = torch.nn.functional.pad((mixed * powers).cumsum(1), (1, 0))
    found = (sums[:, run:] - sums[:, :-run]) * inverses[: sums.shape[1] - run]
    return found[:, ::stride]
