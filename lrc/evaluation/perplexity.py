"""Perplexity of a causal language model on a text. Protocol, version 1:

The text is what ``lrc.text`` reads by the data set's own protocol (WikiText-2 raw: rows joined with two
newlines, a blank row being the empty string). It is tokenized once, without special tokens added by hand, and
cut into non-overlapping windows of ``seq_len`` (default 2048, or the model's limit where that is shorter);
the tail is dropped. Each window is run by itself and its tokens 2..n are scored: natural-log likelihood from
a float32 softmax of the logits, summed in float64. Perplexity is exp(sum / tokens scored). Bits per byte are
sum / ln 2 over the UTF-8 bytes of the tokens scored, counted by decoding: those of each whole window less
those of its first token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from lrc.evaluation.nll import token_nll
from lrc.evaluation.passage import Passage, choose_seq_lens, passages
from lrc.evaluation.streamed import StreamedModel
from lrc.run.processes import ALONE, Ranks
from lrc.text.blocks import batched, ids_sha256
from lrc.text.source import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Model: TypeAlias = PreTrainedModel | StreamedModel

PROTOCOL_VERSION = 1
_LOGIT_BYTES = 2**30  # of one batch, in the model's own dtype
_BATCH_TOKENS = 2**14
_CPU_BATCH_TOKENS = 2**11  # larger ones spend their time on fresh pages for the logits

Advance = Callable[[int], object]
Progress = Callable[[str, int], Advance]
Keep = Callable[
    [Passage, Mapping[str, Tensor]], object
]  # takes a passage's results by token, each (windows, n - 1)


@dataclass(frozen=True)
class Perplexity:
    """One measured perplexity.

    ``nats``: sum of negative log-likelihoods over ``tokens`` scored. ``ids``: tokens of the whole text,
    before windows are cut; ``ids_sha256`` is their hash. ``bits_per_byte`` is None where no tokenizer was
    given, or the tokens scored hold no byte. ``tokens_per_second`` counts the tokens scored.
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


def evaluate_perplexity(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    specs: list[str],
    *,
    data_dir: Path | None = None,
    seq_len: int | Sequence[int] | None = None,
    max_windows: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    keep: Keep | None = None,
    ranks: Ranks = ALONE,
) -> list[Perplexity]:
    """Perplexity on each text named as in ``lrc.text.read_text``, in the order given, in windows of each ``seq_len`` as
    ``passages`` cuts them; of several processes each has the model, and runs its part of the windows.

    ``progress`` is called with a text's label and the number of this process's windows, and gives the function to call
    with the windows done; ``keep`` with each passage and what its tokens cost. Every text is read and cut before the
    model runs. Raises UserError as ``read_text`` and ``passages`` do, and where a window is above the model's limit.
    """
    lengths = choose_seq_lens([("the model", model.config)], seq_len)
    texts = [read_text(spec, "evaluation", data_dir) for spec in specs]
    return [
        measure(
            model,
            passage,
            batch_size=batch_size,
            progress=progress(passage.data, len(ranks.mine(passage.cut))) if progress else None,
            tokenizer=tokenizer,
            keep=keep,
            ranks=ranks,
        )
        for passage in passages(tokenizer, texts, lengths, max_windows)
    ]


def measure(
    model: Model,
    passage: Passage,
    *,
    batch_size: int | None = None,
    progress: Advance | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep: Keep | None = None,
    ranks: Ranks = ALONE,
) -> Perplexity:
    """Return the perplexity on the windows of a passage, of which each process runs its part; it may be inf or NaN.

    ``batch_size`` windows run at once (default: as many as keep the logits below 1 GiB). ``progress`` is called with
    the windows done.
    """
    start = time.perf_counter()
    nll = ranks.woven(window_losses(model, ranks.mine(passage.cut), batch_size, progress).cpu())
    seconds = time.perf_counter() - start
    if keep:
        keep(passage, {"nll": nll})
    return summarise(nll, passage, model.dtype, seconds, tokenizer, ranks)


def summarise(
    nll: Tensor,
    passage: Passage,
    dtype: torch.dtype,
    seconds: float,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ranks: Ranks = ALONE,
) -> Perplexity:
    """The figures that follow from ``nll`` (windows, seq_len - 1), the nats of a passage's scored tokens."""
    scored_bytes = None
    if tokenizer is not None:
        scored_bytes = ranks.total(count_scored_bytes(tokenizer, ranks.mine(passage.cut)))
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


def window_losses(
    model: Model, cut: Tensor, batch_size: int | None = None, progress: Advance | None = None
) -> Tensor:
    """Nats of tokens 2..n of windows (windows, n): (windows, n - 1) float32 on the device of the logits."""
    batch_size = batch_size or default_batch(model, cut.shape[1])
    found = []
    with closing(window_logits(model, cut, batch_size)) as logits:
        for batch in batched(cut, batch_size):
            found.append(token_nll(next(logits), batch))  # without a name, so that none waits beside the next
            if progress:
                progress(len(batch))
    return torch.cat(found) if found else torch.empty(0, cut.shape[1] - 1)


@torch.no_grad()
def window_logits(model: Model, cut: Tensor, batch_size: int) -> Generator[Tensor]:
    """Logits (windows, n, vocab) of ``batch_size`` windows (windows, n) at a time, in the model's own precision."""
    if isinstance(model, StreamedModel):
        yield from model.logits(cut, batch_size)
        return
    device = next(model.parameters()).device
    # one copy ahead of the loop, which then never waits for the device; offloaded models move inputs on
    cut = cut.to("cpu" if device.type == "meta" else device)
    training = model.training
    model.eval()
    try:
        for batch in batched(cut, batch_size):
            yield model(input_ids=batch, use_cache=False).logits
    finally:
        model.train(training)


def count_scored_bytes(tokenizer: PreTrainedTokenizerBase, cut: Tensor) -> int:
    """UTF-8 bytes of tokens 2..n of the windows (windows, n), by decoding.

    Exact but where a window's edge splits a character of several bytes, which adds or loses a few.
    """

    def size(ids: list[int]) -> int:
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return len(str(text).encode())

    return sum(size(window) - size(window[:1]) for window in cut.tolist())


def default_batch(model: Model, seq_len: int) -> int:
    """Windows that run at once unless the caller says how many: as many as keep the logits below 1 GiB."""
    window_bytes = seq_len * model.config.get_text_config().vocab_size * model.dtype.itemsize
    tokens = _CPU_BATCH_TOKENS if model.device.type == "cpu" else _BATCH_TOKENS
    return max(min(_LOGIT_BYTES // window_bytes, tokens // seq_len), 1)
