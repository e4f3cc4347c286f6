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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrc.errors import UserError
from lrc.evaluation.nll import token_nll
from lrc.evaluation.streamed import StreamedModel
from lrc.ranks import ALONE, Ranks
from lrc.text.blocks import batched, ids_sha256, tokenize, windows
from lrc.text.source import Text, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PROTOCOL_VERSION = 1
DEFAULT_SEQ_LEN = 2048
_LOGIT_BYTES = 2**30  # of one batch, in the model's own dtype
_BATCH_TOKENS = 2**14
_CPU_BATCH_TOKENS = 2**11  # larger ones spend their time on fresh pages for the logits

Advance = Callable[[int], object]


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
    model: PreTrainedModel | StreamedModel,
    tokenizer: PreTrainedTokenizerBase,
    specs: list[str],
    *,
    data_dir: Path | None = None,
    seq_len: int | None = None,
    max_windows: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[str, int], Advance] | None = None,
    ranks: Ranks = ALONE,
) -> list[Perplexity]:
    """Perplexity on each text named as in ``lrc.text.read_text``, in the order given; of several processes each has
    the model, and runs its part of the windows.

    ``progress`` is called with a text's label and the number of this process's windows, and gives the function to call
    with the windows done. Every text is read and cut before the model runs. Raises UserError as ``read_text`` and
    ``perplexity`` do.
    """
    length = choose_seq_len(model, seq_len)
    texts = [read_text(spec, "evaluation", data_dir) for spec in specs]
    ids = [tokenize(tokenizer, text.text) for text in texts]
    counts = [count_windows(text, each, length, max_windows) for text, each in zip(texts, ids, strict=True)]
    return [
        perplexity(
            model,
            each,
            data=text.label,
            seq_len=length,
            max_windows=max_windows,
            batch_size=batch_size,
            progress=progress(text.label, len(ranks.mine(range(count)))) if progress else None,
            tokenizer=tokenizer,
            notes=text.notes,
            ranks=ranks,
        )
        for text, each, count in zip(texts, ids, counts, strict=True)
    ]


def perplexity(
    model: PreTrainedModel | StreamedModel,
    ids: Tensor,
    *,
    data: str = "ids",
    seq_len: int | None = None,
    max_windows: int | None = None,
    batch_size: int | None = None,
    progress: Advance | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    notes: tuple[str, ...] = (),
    ranks: Ranks = ALONE,
) -> Perplexity:
    """Perplexity on ids (tokens,), by the protocol above; infinite and NaN values are given as they are.

    ``batch_size`` windows run at once (default: as many as keep the logits below 1 GiB). ``progress`` is
    called with the windows done. Raises UserError where ``seq_len`` is above the model's limit or the text is
    shorter than one window.
    """
    seq_len = choose_seq_len(model, seq_len)
    cut = windows(ids, seq_len)[:max_windows]
    mine = ranks.mine(cut)
    start = time.perf_counter()
    sums = ranks.woven(window_nll(model, mine, batch_size, progress).cpu())
    seconds = time.perf_counter() - start
    scored_bytes = ranks.total(count_scored_bytes(tokenizer, mine)) if tokenizer is not None else None
    return summarise(
        sums,
        ids,
        seq_len,
        data=data,
        dtype=model.dtype,
        scored_bytes=scored_bytes,
        seconds=seconds,
        notes=notes,
    )


def summarise(
    sums: Tensor,
    ids: Tensor,
    seq_len: int,
    *,
    data: str,
    dtype: torch.dtype,
    scored_bytes: int | None,
    seconds: float,
    notes: tuple[str, ...] = (),
) -> Perplexity:
    """The figures that follow from ``sums`` (windows,), the nats of the first windows of ids (tokens,)."""
    tokens = len(sums) * (seq_len - 1)
    nats = sums.double().sum()
    return Perplexity(
        data=data,
        value=(nats / tokens).exp().item(),
        nats=nats.item(),
        tokens=tokens,
        ids=len(ids),
        windows=len(sums),
        seq_len=seq_len,
        dtype=str(dtype).removeprefix("torch."),
        bits_per_byte=nats.item() / math.log(2) / scored_bytes if scored_bytes else None,
        protocol=PROTOCOL_VERSION,
        ids_sha256=ids_sha256(ids),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        notes=notes,
    )


@torch.no_grad()
def window_nll(
    model: PreTrainedModel | StreamedModel,
    cut: Tensor,
    batch_size: int | None = None,
    progress: Advance | None = None,
) -> Tensor:
    """Nats of tokens 2..n of windows (windows, seq_len): (windows,) float64 on the device of the logits."""
    batch_size = batch_size or _batch_size(model, cut.shape[1])
    if isinstance(model, StreamedModel):
        return model.window_nll(cut, batch_size, progress)
    device = next(model.parameters()).device
    # one copy ahead of the loop, which then never waits for the device; offloaded models move inputs on
    cut = cut.to("cpu" if device.type == "meta" else device)
    training = model.training
    model.eval()
    sums = []
    try:
        for batch in batched(cut, batch_size):
            sums.append(token_nll(model(input_ids=batch, use_cache=False).logits, batch))
            if progress:
                progress(len(batch))
    finally:
        model.train(training)
    return torch.cat(sums) if sums else torch.empty(0, dtype=torch.float64)


def count_scored_bytes(tokenizer: PreTrainedTokenizerBase, cut: Tensor) -> int:
    """UTF-8 bytes of tokens 2..n of the windows (windows, n), by decoding.

    Exact but where a window's edge splits a character of several bytes, which adds or loses a few.
    """

    def size(ids: list[int]) -> int:
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return len(str(text).encode())

    return sum(size(window) - size(window[:1]) for window in cut.tolist())


def choose_seq_len(model: PreTrainedModel | StreamedModel, asked: int | None) -> int:
    """The window asked for, else 2048 or the model's limit; UserError above that limit or below 2."""
    return _window(_positions(model.config), asked)


def shared_seq_len(folders: Iterable[Path], asked: int | None, *, trust_remote_code: bool = False) -> int:
    """The window that the models in all the folders can be measured with, chosen as for one; reads no weight.

    Raises UserError where a folder's config.json cannot be used, and as ``choose_seq_len`` does.
    """
    from transformers import AutoConfig

    limits = []
    for folder in folders:
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (ValueError, OSError) as error:
            raise UserError(
                f"{folder / 'config.json'} cannot be used: {str(error).splitlines()[0]}"
            ) from error
        limits.append(_positions(config))
    return _window(min((limit for limit in limits if limit is not None), default=None), asked)


def count_windows(text: Text, ids: Tensor, seq_len: int, max_windows: int | None) -> int:
    """Windows that a text's ids are scored in; UserError where they do not fill one."""
    try:
        return len(windows(ids, seq_len)[:max_windows])
    except UserError as error:
        raise UserError(f"{text.label}: {error}") from None


def _positions(config: PreTrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _window(limit: int | None, asked: int | None) -> int:
    if asked is None:
        return min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN)
    if asked < 2:
        raise UserError(f"seq_len {asked} leaves no token to score; the smallest is 2")
    if limit is not None and asked > limit:
        raise UserError(f"seq_len {asked} is longer than the model's {limit} positions; use {limit} or less")
    return asked


def _batch_size(model: PreTrainedModel | StreamedModel, seq_len: int) -> int:
    window_bytes = seq_len * model.config.get_text_config().vocab_size * model.dtype.itemsize
    tokens = _CPU_BATCH_TOKENS if model.device.type == "cpu" else _BATCH_TOKENS
    return max(min(_LOGIT_BYTES // window_bytes, tokens // seq_len), 1)
