"""Check conversations and write them as text by a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lrc.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = tuple[dict[str, Any], ...]
_EXAMPLE = '{"role": "user", "content": "Hello"}'


def read_conversation(value: Sequence[object], place: str) -> Conversation:
    """Return a list of messages, each with a role and text; fields that are null are left out.

    Raises UserError at ``place`` for an empty list and for any other value.
    """
    if not value:
        raise UserError(f"{place}: a conversation without messages")
    found = []
    for number, message in enumerate(value, 1):
        where = f"{place}, message {number}"
        if not isinstance(message, dict):
            raise UserError(
                f"{where}: expected an object with role and content, found {type(message).__name__}"
            )
        for key in ("role", "content"):
            if not isinstance(held := message.get(key), str):
                kind = "missing" if held is None else f"{type(held).__name__}, not text"
                raise UserError(f"{where}: {key} is {kind}; a message is such as {_EXAMPLE}")
        found.append({key: held for key, held in message.items() if held is not None})
    return tuple(found)


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(
    tokenizer: PreTrainedTokenizerBase, chat: Sequence[Conversation], name: str, *, lenient: bool = False
) -> list[str]:
    """Return conversations as the tokenizer's chat template writes them, with the special tokens as text.

    ``lenient``: leave out conversations that the template refuses, such as those with a system message. Raises
    UserError if there is no template, and for a conversation that the template refuses, or for the last if it refuses
    all.
    """
    if not has_template(tokenizer):
        raise UserError(
            f"{name} holds conversations, but the tokenizer has no chat template; name a plain text, or add "
            "chat_template.jinja to the model's folder"
        )
    found = []
    for row, conversation in enumerate(chat, 1):
        try:
            found.append(str(tokenizer.apply_chat_template([*conversation], tokenize=False)))
        except Exception as error:  # a template is a program that raises what it likes
            if lenient and (found or row < len(chat)):
                continue
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise UserError(
                f"{name}, row {row}: the chat template refuses the conversation: {reason}"
            ) from error
    return found
