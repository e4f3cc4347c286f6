"""Blocks to measure on that were not fitted to, and proof that they were not."""

from __future__ import annotations

import torch
from torch import Tensor

from lrc.errors import UserError
from lrc.text.blocks import windows

_RUN = 64  # tokens in a row that two unrelated texts do not share


def held_out_blocks(ids: Tensor, count: int, fitted: Tensor) -> Tensor:
    """The first ``count`` blocks (count, tokens) of ids (n,) that are none of the ``fitted`` blocks (m, tokens).

    Of the very text that was fitted to, those are the blocks left over. Raises UserError where there are fewer, or
    where one shares a passage with the fitted blocks: 64 tokens in a row, or half a block where that is shorter.
    """
    seq_len = fitted.shape[1]
    blocks = windows(ids, seq_len)
    left = blocks[~torch.isin(_hashes(blocks, seq_len, seq_len), _hashes(fitted, seq_len, seq_len)).flatten()]
    if count > len(left):
        drawn = len(blocks) - len(left)
        because = f", beside {drawn} that calibration draws" if drawn else ""
        remedy = f"use {len(left)}, or " if len(left) else ""
        raise UserError(
            f"it holds {len(left)} blocks of {seq_len} tokens{because}, fewer than the {count} held-out samples "
            f"asked for; {remedy}another text"
        )
    chosen, run = left[:count], min(_RUN, seq_len // 2)
    shared = torch.isin(_hashes(chosen, run, 1), _hashes(fitted, run, 1)).any(dim=1)
    if shared.any():
        numbers = ", ".join(str(int(n)) for n in shared.nonzero()[:5])
        raise UserError(
            f"it overlaps the calibration blocks (held-out block {numbers} holds {run} tokens in a row of theirs), so "
            "that a loss measured on it would flatter; use another text"
        )
    return chosen


def _hashes(blocks: Tensor, run: int, stride: int) -> Tensor:
    """A 64-bit hash of every run of tokens inside each block, at every ``stride``: (blocks, runs)."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (run,), generator=generator) * 2 + 1
    return torch.stack([(block.unfold(0, run, stride) * weights).sum(dim=1) for block in blocks])
