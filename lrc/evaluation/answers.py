"""Write greedy answers to a few short prompts, by an original and by its compressed output."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrc.errors import UserError
from lrc.evaluation.folder import Loading, loaded
from lrc.evaluation.perplexity import Model
from lrc.evaluation.streamed import StreamedModel
from lrc.modules.cache import cache_argument
from lrc.text.blocks import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "Why is the sky blue?",
    "Name three fruits that are red.",
    "Complete this Python function: def is_even(n): return",
    "What is 17 + 25?",
    "Wie heißt die Hauptstadt von Frankreich?",
)
NEW_TOKENS = 40


@dataclass(frozen=True)
class Written:
    """Hold a written text; ``ended``: the model ended it, rather than the limit of tokens."""

    text: str
    ended: bool


@dataclass(frozen=True)
class Answer:
    """Hold a prompt as a user types it, and what the original and the output answer."""

    prompt: str
    before: Written
    after: Written


@dataclass(frozen=True)
class Answers:
    """Hold the answers of both models, and in ``skipped`` why others are missing.

    ``chat``: prompts went through the tokenizer's chat template; otherwise the models continue them as plain text.
    """

    chat: bool
    answers: list[Answer]
    skipped: list[str]


def write_answers(
    models: Sequence[Model],
    folders: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    loading: Loading,
    prompts: Sequence[str] = PROMPTS,
) -> Answers:
    """Return the answers of the original and the output: their models, loaded from ``folders``.

    Streamed models are loaded whole, one after the other, where each fits. Whatever fails is a reason in ``skipped``,
    because the compression itself is finished.
    """
    chat, encoded, skipped = bool(tokenizer.chat_template), dict[str, list[int]](), list[str]()
    rows = min(model.config.get_text_config().vocab_size for model in models)
    limit = getattr(models[0].config.get_text_config(), "max_position_embeddings", None)
    for prompt in prompts:
        try:
            ids = encode_prompt(tokenizer, prompt, chat, rows)
        except Exception as error:  # templates and tokenizers raise whatever they like
            skipped.append(f"no answers to {prompt!r}: the tokenizer fails ({reason(error)})")
            continue
        if limit is not None and len(ids) + NEW_TOKENS > limit:
            needed = f"{len(ids)} tokens and {NEW_TOKENS} new ones exceed the model's {limit} positions"
            skipped.append(f"no answers to {prompt!r}: {needed}")
            continue
        encoded[prompt] = ids
    if not encoded:
        return Answers(chat, [], skipped)
    written = list[list[Written]]()
    for model, folder in zip(models, folders, strict=True):
        again = isinstance(model, StreamedModel)
        with loaded([folder], rows, loading) if again else nullcontext([model]) as (whole,):
            if isinstance(whole, StreamedModel):
                room = f"no prompts are answered: {folder} does not fit whole on {loading.device}"
                return Answers(chat, [], [*skipped, room])
            try:
                written.append(_write(whole, tokenizer, [*encoded.values()]))
            except Exception as error:  # such as a lack of memory, or code that comes with a model
                failed = f"no prompts are answered: {folder} fails to write ({reason(error)})"
                return Answers(chat, [], [*skipped, failed])
            del whole  # leaves room for the next one
    return Answers(chat, [Answer(*each) for each in zip(encoded, *written, strict=True)], skipped)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool, rows: int) -> list[int]:
    """Return the ids of a prompt, written by the chat template if ``chat``.

    ``rows``: of the embedding. Raises UserError for an id beyond them; templates raise whatever they like.
    """
    text = prompt
    if chat:
        turn = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    ids = tokenizer(text, add_special_tokens=not chat)[
        "input_ids"
    ]  # a template writes its own special tokens
    check_ids(tokenizer, torch.tensor(ids), rows)
    return [*ids]


def reason(error: Exception) -> str:
    """Return the first line of an error's message, with the name of its class unless it is written for users."""
    name = [] if isinstance(error, UserError) else [type(error).__name__]
    return ": ".join([*name, *str(error).splitlines()[:1]])


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]
) -> list[Written]:
    return [
        Written(str(tokenizer.decode(ids, skip_special_tokens=True)).strip(), ended)
        for ids, ended in continue_prompts(model, prompts, NEW_TOKENS)
    ]


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel, prompts: Sequence[list[int]], new_tokens: int
) -> list[tuple[list[int], bool]]:
    """Return a model's most likely continuation of each prompt, and whether the model ended it.

    All run in one batch, padded at the left, for at most ``new_tokens``. The end token is left out.
    """
    ends = model.generation_config.eos_token_id if model.generation_config else None
    end = torch.tensor([] if ends is None else ends, dtype=torch.int64, device=model.device).view(-1)
    longest = max(map(len, prompts))
    pads = torch.tensor([[longest - len(ids)] for ids in prompts])
    last = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts]).to(model.device)
    mask = (torch.arange(longest) >= pads).long().to(model.device)
    places, cache, found = (mask.cumsum(1) - 1).clamp_min(0), None, list[Tensor]()
    ended, name = torch.zeros_like(last[:, :1], dtype=torch.bool), cache_argument(model.forward)
    while len(found) < new_tokens and not ended.all():
        out = model(input_ids=last, attention_mask=mask, position_ids=places, use_cache=True, **{name: cache})
        last, cache = out.logits[:, -1:].argmax(-1), out[name]
        ended = ended | torch.isin(last, end)
        found.append(last)
        places, mask = places[:, -1:] + 1, torch.cat([mask, torch.ones_like(last)], dim=1)
    written = list[tuple[list[int], bool]]()
    for ids in torch.cat(found, dim=1).tolist():
        stop = next((i for i, token in enumerate(ids) if token in end.tolist()), None)
        written.append((ids[:stop], stop is not None))
    return written
