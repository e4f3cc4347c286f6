"""Cut texts into the windows that a model is scored on, of one length or several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrc.errors import UserError
from lrc.text.blocks import tokenize, windows
from lrc.text.mixture import about
from lrc.text.source import Text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True)
class Passage:
    """Hold all ids (tokens,) of a text and the windows (windows, seq_len) that are scored."""

    data: str
    ids: Tensor
    cut: Tensor
    notes: tuple[str, ...] = ()

    @property
    def seq_len(self) -> int:
        return self.cut.shape[1]


def passages(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    seq_lens: Sequence[int],
    max_windows: int | None = None,
    rows: int | None = None,
    first: int | None = None,
) -> list[Passage]:
    """Cut every text into windows of every length, text by text.

    All lengths cover the same tokens, the first ``max_windows`` (default: all) windows of the longest length; a length
    that does not divide them drops the rest. ``first``: the token that every window starts with. Raises UserError if a
    text does not fill one window, or has an id beyond the ``rows`` of the embedding.
    """
    found = []
    for text in texts:
        with about(text.label):
            ids, longest = tokenize(tokenizer, text.text, rows, first), max(seq_lens)
        span = count_windows(text, ids, longest, max_windows, first) * (longest - (first is not None))
        notes, whole = text.notes, ids
        if first is not None:
            whole = torch.cat([torch.tensor([first]), ids])  # so that other windows have another hash
            token = tokenizer.convert_ids_to_tokens(first)
            notes = (
                *notes,
                f"{text.label}: every window starts with {token} (id {first}), as the model needs it",
            )
        found += [
            Passage(text.label, whole, windows(ids[:span], length, first), notes) for length in seq_lens
        ]
    return found


def choose_seq_lens(
    models: Iterable[tuple[str, PreTrainedConfig]], asked: int | Sequence[int] | None
) -> tuple[int, ...]:
    """Return the lengths of windows asked for, else 2048 or the limit of the models, each a name and a config.

    Raises UserError for a length above that limit or below 2, for one that comes twice, and where there is none.
    """
    limits = [(getattr(c.get_text_config(), "max_position_embeddings", None), name) for name, c in models]
    limit, name = min((each for each in limits if each[0] is not None), default=(None, ""))
    if asked is None:
        return (min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN),)
    option, lengths = ("--seq-len", [asked]) if isinstance(asked, int) else ("--context", [*asked])
    listed = f"{option} {','.join(map(str, lengths))}"
    if not lengths or len(set(lengths)) < len(lengths):
        raise UserError(f"{listed}: give distinct lengths of windows, such as 512,1024,2048")
    for length in lengths:
        where = listed if len(lengths) == 1 else f"{listed}: {length}"
        if length < 2:
            raise UserError(f"{where} leaves no token to score; the smallest is 2")
        if limit is not None and length > limit:
            raise UserError(f"{where} is longer than the {limit} positions of {name}; use {limit} or less")
    return tuple(lengths)


def count_windows(
    text: Text, ids: Tensor, seq_len: int, max_windows: int | None, first: int | None = None
) -> int:
    """Count the windows that a text is scored in; raise UserError if it does not fill one."""
    with about(text.label):
        return len(windows(ids, seq_len, first)[:max_windows])
