"""Choose held-out blocks and check that they do not overlap the calibration blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from lrc.errors import UserError
from lrc.text.blocks import windows

_RUN = 64  # tokens in a row that two unrelated texts do not share


def held_out_blocks(ids: Tensor, count: int, fitted: Tensor) -> Tensor:
    """Return the first ``count`` blocks (count, tokens) of ids (n,) that are not among ``fitted`` (m, tokens).

    Raises UserError if there are fewer, or if one shares a run of tokens with the fitted blocks: 64 tokens, or half a
    block if that is shorter.
    """
    seq_len = fitted.shape[1]
    blocks = windows(ids, seq_len)
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
    shared = torch.isin(_hashes(chosen, run, 1), _hashes(fitted, run, 1)).any(dim=1)
    if shared.any():
        numbers = ", ".join(str(int(n)) for n in shared.nonzero()[:5])
        raise UserError(
            f"it overlaps the calibration blocks (held-out block {numbers} shares {run} tokens in a row), so a loss "
            "measured on it would be too low; use another text"
        )
    return chosen


def _hashes(blocks: Tensor, run: int, stride: int) -> Tensor:
    """Return a 64-bit hash of every run of ``run`` tokens in each block, ``stride`` apart: (blocks, runs)."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (run,), generator=generator) * 2 + 1
    return torch.stack([(block.unfold(0, run, stride) * weights).sum(dim=1) for block in blocks])
