"""What a model is scored on: windows of a text's tokens, of one length or of several on the same text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lrc.errors import UserError
from lrc.text.blocks import tokenize, windows
from lrc.text.source import Text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True)
class Passage:
    """A text's ids (tokens,), whole, and the windows (windows, seq_len) of them that are scored."""

    data: str
    ids: Tensor
    cut: Tensor
    notes: tuple[str, ...] = ()

    @property
    def seq_len(self) -> int:
        """Tokens of a window."""
        return self.cut.shape[1]


def passages(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    seq_lens: Sequence[int],
    max_windows: int | None = None,
) -> list[Passage]:
    """Every text in windows of every length, the lengths of a text together.

    Windows of all lengths are of the same stretch, but for the rest where a length does not divide it: what whole
    windows of the longest hold, the first ``max_windows`` of these where that is given. Raises UserError where a text
    does not fill one.
    """
    found = []
    for text in texts:
        ids, longest = tokenize(tokenizer, text.text), max(seq_lens)
        span = count_windows(text, ids, longest, max_windows) * longest
        found += [Passage(text.label, ids, windows(ids[:span], seq_len), text.notes) for seq_len in seq_lens]
    return found


def choose_seq_lens(
    models: Iterable[tuple[str, PreTrainedConfig]], asked: int | Sequence[int] | None
) -> tuple[int, ...]:
    """Return the lengths of windows asked for, else 2048 or the limit of the models, each a name and a config.

    Raises UserError for a length above that limit or below 2, for one that comes twice, and where there is none.
    """
    limits = [(limit, name) for name, config in models if (limit := _positions(config)) is not None]
    limit, name = min(limits, default=(None, ""))
    if asked is None:
        return (min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN),)
    option, lengths = ("--seq-len", [asked]) if isinstance(asked, int) else ("--context", [*asked])
    listed = f"{option} {','.join(map(str, lengths))}"
    if not lengths or len(set(lengths)) < len(lengths):
        raise UserError(f"{listed}: lengths of windows are distinct, such as 512,1024,2048")
    for length in lengths:
        told = listed if len(lengths) == 1 else f"{listed}: {length}"
        if length < 2:
            raise UserError(f"{told} leaves no token to score; the smallest is 2")
        if limit is not None and length > limit:
            raise UserError(f"{told} is longer than the {limit} positions of {name}; use {limit} or less")
    return tuple(lengths)


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A folder's config.json; UserError where it cannot be used."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be used: {str(error).splitlines()[0]}") from error


def count_windows(text: Text, ids: Tensor, seq_len: int, max_windows: int | None) -> int:
    """Windows that a text's ids are scored in; UserError where they do not fill one."""
    try:
        return len(windows(ids, seq_len)[:max_windows])
    except UserError as error:
        raise UserError(f"{text.label}: {error}") from None


def _positions(config: PreTrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)
