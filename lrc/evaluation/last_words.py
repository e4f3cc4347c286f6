"""Measure how well models predict the last word of a passage, as LAMBADA asks.

The word needs the whole passage: people guess it from all of it, and hardly from its last sentence alone. D. Paperno et
al., "The LAMBADA dataset", ACL 2016; the test set as OpenAI wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lrc.evaluation.bootstrap import Estimate, mean, ratio
from lrc.evaluation.perplexity import Model, default_batch, steps, window_logits
from lrc.run.settings import Run
from lrc.text.blocks import batched
from lrc.text.files import read_rows
from lrc.text.source import data_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tasks/lambada_openai.jsonl.gz", "lambada_openai.jsonl", "lambada_openai/test.jsonl")
PASSAGES = 500
_LONGEST = 256  # tokens of a passage; of a longer one the beginning is left out


@dataclass(frozen=True)
class LastWords:
    """Hold two models' figures on the last words of LAMBADA's first ``passages``.

    ``right``: the share of words of which each token is the most likely one; ``perplexity``: exp of the mean loss of a
    word, as of the task ``lambada_openai``. ``gain``: the difference of the shares, and ``ratio`` that of the
    perplexities, after against before, with paired intervals over passages.
    """

    passages: int
    right_before: float
    right_after: float
    gain: Estimate
    perplexity_before: float
    perplexity_after: float
    ratio: Estimate


def find_passages(data_dir: Path | None) -> list[str]:
    """Return the first passages of LAMBADA's file in the data folder; an empty list if there is no such file."""
    folder = data_folder(data_dir)
    files = [folder / file for file in FILES if (folder / file).is_file()] if folder else []
    rows = read_rows(files[0], "text", PASSAGES) if files else []
    return [row for row in rows if isinstance(row, str)]


def last_words(
    models: Sequence[Model],
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[str],
    run: Run = Run(),
) -> LastWords | None:
    """Compare the output and the original, in this order, on the last words of passages; None if there are no words.

    The word is what follows the last space. Context and word are tokenized together, without special tokens, as
    lm-evaluation-harness does. A passage of one word, or with an id beyond the embedding, is left out.
    """
    configs = [model.config.get_text_config() for model in models]
    rows = min(config.vocab_size for config in configs)
    positions = getattr(configs[0], "max_position_embeddings", None) or _LONGEST
    found, spans = _encode(tokenizer, passages, rows, min(positions, _LONGEST))
    if not found:
        return None
    ids, scores = pad_sequence(found, batch_first=True), [list[tuple[Tensor, Tensor]]() for _ in models]
    size = min(default_batch(model, ids.shape[1]) for model in models)
    advance = run.stage("last words", sum(steps(model, len(ids)) for model in models) - len(ids))
    with ExitStack() as stack:
        streams = [stack.enter_context(closing(window_logits(model, ids, size, advance))) for model in models]
        for batch, words in zip(batched(ids, size), batched(torch.tensor(spans), size), strict=True):
            for logits, parts in zip(streams, scores, strict=True):
                parts += _scores(next(logits), batch, words)
            advance(len(batch))
    (after, right_after), (before, right_before) = (
        [torch.stack(column).double().cpu()[:, None] for column in zip(*parts, strict=True)]
        for parts in scores
    )
    return LastWords(
        len(ids),
        right_before.mean().item(),
        right_after.mean().item(),
        mean(right_after - right_before),
        before.mean().exp().item(),
        after.mean().exp().item(),
        ratio(after, before),
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase, passages: Sequence[str], rows: int, limit: int
) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Return the ids (tokens,) of passages, and where their last words start and end.

    Of more than ``limit`` tokens the first are left out.
    """
    found, spans = list[Tensor](), list[tuple[int, int]]()
    for passage in passages:
        context, whole = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (passage.rpartition(" ")[0], passage)
        )
        cut = max(len(whole) - limit, 0)
        if cut < len(context) < len(whole) and max(whole) < rows:
            found.append(torch.tensor(whole[cut:]))
            spans.append((len(context) - cut, len(whole) - cut))
    return found, spans


def _scores(logits: Tensor, ids: Tensor, spans: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each passage the nats of its last word, and whether each of its tokens is the most likely one."""
    ids = ids.to(logits.device)
    for scores, tokens, (start, end) in zip(logits, ids, spans.tolist(), strict=True):
        scores, word = scores[start - 1 : end - 1].float(), tokens[start:end]
        yield F.cross_entropy(scores, word, reduction="sum"), (scores.argmax(-1) == word).all()
