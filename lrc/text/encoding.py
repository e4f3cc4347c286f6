"""Turn a text or a chat into token ids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrc.text.blocks import check_ids, tokenize
from lrc.text.chat import render
from lrc.text.source import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEW_BYTES = 2.0  # bytes a token, below which a tokenizer does not handle a text's language
_STRETCHES = 16
_BYTE_LEVEL = 1024  # tokens of a tokenizer that writes single bytes or characters, whatever the language


@dataclass(frozen=True)
class Encoded:
    """Hold the ids (tokens,) of a text of ``bytes`` in UTF-8, and notes about it."""

    ids: Tensor
    bytes: int
    notes: tuple[str, ...] = ()

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(len(self.ids), 1)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    rows: int | None = None,
    first: int | None = None,
    *,
    lenient: bool = False,
) -> Encoded:
    """Tokenize a text as a whole, or each conversation of a chat as the tokenizer's template writes it.

    Conversations get no special tokens besides those of the template. ``first`` as for ``tokenize``, also of a chat;
    ``lenient`` as for ``render``. Raises UserError
    for an id beyond the ``rows`` of the model's embedding, and as ``render`` does.
    """
    if not text.chat:
        return Encoded(tokenize(tokenizer, text.text, rows, first), len(text.text.encode()))
    written = render(tokenizer, text.chat, text.label, lenient=lenient)
    encoding = tokenizer(
        written,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids = torch.tensor([*chain(*encoding["input_ids"])], dtype=torch.int64)
    ids = ids[1:] if first is not None and ids[:1].tolist() == [first] else ids
    if rows is not None:
        check_ids(tokenizer, ids, rows)
    refused = len(text.chat) - len(written)
    notes = (f"{text.label}: {refused} conversations that the chat template refuses are left out",)
    return Encoded(ids, sum(len(each.encode()) for each in written), notes if refused else ())


def excerpt(text: Text, limit: int) -> Text:
    """Return a text of about ``limit`` characters: stretches or conversations, spread evenly over the whole."""
    if len(text.text) <= limit:
        return text
    if text.chat:
        return replace(text, chat=text.chat[:: -(-len(text.text) // limit)])
    starts = [len(text.text) * i // _STRETCHES for i in range(_STRETCHES)]
    starts = [text.text.find("\n", at) + 1 if at else 0 for at in starts]
    return replace(text, text="\n\n".join(text.text[at : at + limit // _STRETCHES] for at in starts))


def handles(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> bool:
    """Tell whether a tokenizer handles the language of a text: it writes at least 2 bytes a token, or never could."""
    return encoded.bytes_per_token >= FEW_BYTES or len(tokenizer) <= _BYTE_LEVEL
