"""Measure the perplexity of a causal language model by protocol version 2.

``lrc.text`` reads the text by its data set's protocol (WikiText-2 raw: rows joined with two newlines, a blank row is
the empty string). It is tokenized once, with the tokenizer's own special tokens, and cut into windows of ``seq_len``
that do not overlap (default 2048, or the model's limit if shorter); the tail is dropped. Each window runs separately
and its tokens 2..n are scored: natural-log likelihood from a float32 softmax, summed in float64. Perplexity is
exp(sum / scored tokens). Bits per byte are sum / ln 2 over the UTF-8 bytes of the scored tokens, counted by decoding:
the bytes of each window less those of its first token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from lrc.evaluation.passage import Passage
from lrc.evaluation.streamed import StreamedModel
from lrc.evaluation.tokens import token_nll
from lrc.run.processes import Processes
from lrc.run.settings import Run
from lrc.text.blocks import batched, ids_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROTOCOL_VERSION = 2
_LOGIT_BYTES = 2**30  # of one batch, in the model's dtype
_BATCH_TOKENS = 2**14
_CPU_BATCH_TOKENS = 2**11  # larger batches spend their time on fresh memory pages for the logits

Model: TypeAlias = "PreTrainedModel | StreamedModel"
# Function that stores the results by token of a passage, each (windows, n - 1).
TokenWriter = Callable[[Passage, Mapping[str, Tensor]], object]


@dataclass(frozen=True)
class Perplexity:
    """Hold one measured perplexity.

    ``nats``: sum of negative log-likelihoods over the scored ``tokens``. ``ids``: tokens of the whole text, before
    windows are cut; ``ids_sha256``: their hash. ``bits_per_byte``: None without a tokenizer, or if the scored tokens
    have no bytes. ``tokens_per_second``: scored tokens.
    """

    data: str
    value: float
    nats: float
    tokens: int
    ids: int
    windows: int
    seq_len: int
    dtype: str
    bits_per_byte: float | None
    protocol: int
    ids_sha256: str
    seconds: float
    tokens_per_second: float
    notes: tuple[str, ...] = ()


def measure(
    model: Model,
    passage: Passage,
    tokenizer: PreTrainedTokenizerBase | None = None,
    run: Run = Run(),
    keep: TokenWriter | None = None,
) -> Perplexity:
    """Return the perplexity on the windows of a passage; it may be inf or NaN.

    ``keep`` gets the passage and its loss by token. Without ``tokenizer`` there are no bits per byte.
    """
    mine = run.processes.mine(passage.cut)
    advance = run.stage(passage.data, steps(model, len(mine)))
    start = time.perf_counter()
    nll = run.processes.gather_rows(window_losses(model, mine, progress=advance).cpu())
    seconds = time.perf_counter() - start
    if keep:
        keep(passage, {"nll": nll})
    return summarise(nll, passage, model.dtype, seconds, tokenizer, run.processes)


def summarise(
    nll: Tensor,
    passage: Passage,
    dtype: torch.dtype,
    seconds: float,
    tokenizer: PreTrainedTokenizerBase | None,
    processes: Processes,
) -> Perplexity:
    """Compute the figures from ``nll`` (windows, seq_len - 1), the nats of a passage's scored tokens."""
    own_bytes = count_scored_bytes(tokenizer, processes.mine(passage.cut)) if tokenizer else 0
    scored_bytes = processes.total(own_bytes)
    tokens, nats = nll.numel(), nll.double().sum(dim=1).sum()
    return Perplexity(
        data=passage.data,
        value=(nats / tokens).exp().item(),
        nats=nats.item(),
        tokens=tokens,
        ids=len(passage.ids),
        windows=len(nll),
        seq_len=passage.seq_len,
        dtype=str(dtype).removeprefix("torch."),
        bits_per_byte=nats.item() / math.log(2) / scored_bytes if scored_bytes else None,
        protocol=PROTOCOL_VERSION,
        ids_sha256=ids_sha256(passage.ids),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        notes=passage.notes,
    )


def window_losses(model: Model, cut: Tensor, progress: Callable[[int], object] = lambda done: None) -> Tensor:
    """Return the nats (windows, n - 1) of tokens 2..n of windows (windows, n), float32, on the logits' device."""
    batch_size, found = default_batch(model, cut.shape[1]), []
    with closing(window_logits(model, cut, batch_size, progress)) as logits:
        for batch in batched(cut, batch_size):
            found.append(token_nll(next(logits), batch))  # unnamed logits are freed before the next batch
            progress(len(batch))
    return torch.cat(found) if found else torch.empty(0, cut.shape[1] - 1)


def steps(model: Model, windows: int) -> int:
    """Return the steps of an evaluation: windows, and for a streamed model also windows times layers."""
    layers = model.config.get_text_config().num_hidden_layers if isinstance(model, StreamedModel) else 0
    return windows * (1 + layers)


@torch.no_grad()
def window_logits(
    model: Model, cut: Tensor, batch_size: int, progress: Callable[[int], object] = lambda done: None
) -> Generator[Tensor]:
    """Yield the logits (windows, n, vocab) of ``batch_size`` windows (windows, n) at a time, in the model's dtype.

    ``progress`` is called with the steps of a streamed model before its first logits.
    """
    if isinstance(model, StreamedModel):
        yield from model.logits(cut, batch_size, progress)
        return
    device = next(model.parameters()).device
    # copied once, so that the loop never waits for the device; offloaded models move inputs themselves
    cut = cut.to("cpu" if device.type == "meta" else device)
    training = model.training
    model.eval()
    try:
        for batch in batched(cut, batch_size):
            yield model(input_ids=batch, use_cache=False).logits
    finally:
        model.train(training)


def count_scored_bytes(tokenizer: PreTrainedTokenizerBase, cut: Tensor) -> int:
    """Count the UTF-8 bytes of tokens 2..n of the windows (windows, n) by decoding.

    A window's edge inside a multi-byte character shifts the count by a few bytes.
    """

    def size(ids: list[int]) -> int:
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return len(str(text).encode())

    return sum(size(window) - size(window[:1]) for window in cut.tolist())


def default_batch(model: Model, seq_len: int) -> int:
    """Return the most windows that run at once by default: 1 GiB of logits, 16,384 tokens (CPU: 2,048)."""
    window_bytes = seq_len * model.config.get_text_config().vocab_size * model.dtype.itemsize
    tokens = _CPU_BATCH_TOKENS if model.device.type == "cpu" else _BATCH_TOKENS
    return max(min(_LOGIT_BYTES // window_bytes, tokens // seq_len), 1)
