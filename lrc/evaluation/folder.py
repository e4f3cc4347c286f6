"""Perplexity of a checkpoint in a folder, whose model is loaded for it, whole where it fits, and let go."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lrc.checkpoint.headers import read_headers
from lrc.evaluation.perplexity import Perplexity, evaluate_perplexity
from lrc.evaluation.streamed import StreamedModel
from lrc.hub.loader import load
from lrc.hub.tokenizer import load_tokenizer
from lrc.ranks import Ranks
from lrc.room import fits_whole

Progress = Callable[[str, int], Callable[[int], object]]


def evaluate_folder(
    path: Path,
    specs: list[str],
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    data_dir: Path | None,
    streamed: bool | None,
    scratch: Path,
    seq_len: int | None = None,
    max_windows: int | None,
    allow_pickle: bool,
    trust_remote_code: bool,
    progress: Progress | None,
    ranks: Ranks,
) -> list[Perplexity]:
    """Perplexities of a folder's model on each text of ``specs``, run in ``dtype``, None being as it is stored.

    ``streamed``: a layer at a time, or whole; None is whole where it fits. ``scratch``: where hidden states that are
    streamed and have no room in memory go. Raises UserError for a model or a text that cannot be had.
    """
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    trusted: dict[str, Any] = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    if streamed is None:
        stored = read_headers(path.glob("*.safetensors")).values()
        streamed = bool(stored) and not fits_whole(stored, len(tokenizer), dtype, device)
    if streamed:
        model = StreamedModel(path, device, dtype, scratch, **trusted)
    else:
        model = load(path, device=device, dtype=dtype or "auto", **trusted)
    try:
        return evaluate_perplexity(
            model,
            tokenizer,
            specs,
            data_dir=data_dir,
            seq_len=seq_len,
            max_windows=max_windows,
            progress=progress,
            ranks=ranks,
        )
    finally:
        # Models hold references to themselves: only the collector frees the memory for the next one.
        del model
        gc.collect()
