"""Measure how well models predict the last word of a passage, as LAMBADA asks.

The word needs the whole passage: people guess it from all of it, and hardly from its last sentence alone. D. Paperno et
al., "The LAMBADA dataset", ACL 2016; the test set as OpenAI wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Hold two models' figures on the last words of ``passages``, of the first ``asked`` of LAMBADA.

    The accuracy is the share of words of which each token is the most likely one. The perplexity is exp of the mean
    loss of a word, as of the task ``lambada_openai``. ``accuracy_change``: the difference of the shares, and
    ``perplexity_ratio``: that of the perplexities, after against before, with paired intervals over passages.
    """

    asked: int
    passages: int
    accuracy_before: float
    accuracy_after: float
    accuracy_change: Estimate
    perplexity_before: float
    perplexity_after: float
    perplexity_ratio: Estimate


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
    first: int | None = None,
) -> LastWords | None:
    """Compare the output and the original, in this order, on the last words of passages; None if there are no words.

    The word is what follows the last space. Context and word are tokenized together, with the special tokens of the
    tokenizer, as lm-evaluation-harness does. A passage of one word, or with an id beyond the embedding, is left out.
    Each process scores its share. ``first``: the token that every passage starts with, if the model needs one.
    """
    configs = [model.config.get_text_config() for model in models]
    rows = min(config.vocab_size for config in configs)
    positions = getattr(configs[0], "max_position_embeddings", None) or _LONGEST
    encoded = _encode(tokenizer, passages, rows, min(positions, _LONGEST), first)
    if not encoded:
        return None
    ids = run.processes.mine(pad_sequence([each for each, _, _ in encoded], batch_first=True))
    spans = run.processes.mine(torch.tensor([span for _, *span in encoded]))
    size = min(default_batch(model, ids.shape[1]) for model in models)
    advance = run.stage("last words", sum(steps(model, len(ids)) for model in models) - len(ids))
    scores = [[torch.empty(0, 2, dtype=torch.float64)] for _ in models]  # a process may have no passages
    with ExitStack() as stack:
        streams = [stack.enter_context(closing(window_logits(model, ids, size, advance))) for model in models]
        for batch, words in zip(batched(ids, size), batched(spans, size), strict=True):
            for logits, parts in zip(streams, scores, strict=True):
                parts.append(_scores(next(logits), batch, words))
            advance(len(batch))
    (after, right_after), (before, right_before) = (
        run.processes.gather_rows(torch.cat(parts)).split(1, dim=1) for parts in scores
    )
    return LastWords(
        len(passages),
        len(encoded),
        right_before.mean().item(),
        right_after.mean().item(),
        mean(right_after - right_before),
        before.mean().exp().item(),
        after.mean().exp().item(),
        ratio(after, before),
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase, passages: Sequence[str], rows: int, limit: int, first: int | None
) -> list[tuple[Tensor, int, int]]:
    """Return the ids (tokens,) of each passage, and where its last word starts and ends.

    Of more than ``limit`` tokens the first are left out, but for a token that marks the beginning of a text.
    """
    found = []
    for passage in passages:
        context, ids = (
            tokenizer(text, verbose=False)["input_ids"] for text in (passage.rpartition(" ")[0], passage)
        )
        if first is not None and ids[:1] != [first]:
            context, ids = [first, *context], [first, *ids]
        marked = int(bool(ids) and ids[0] == tokenizer.bos_token_id)
        cut = max(len(ids) - limit, 0)
        if cut + marked < len(context) < len(ids) and max(ids) < rows:
            kept = ids[:marked] + ids[marked + cut :]
            found.append((torch.tensor(kept), len(context) - cut, len(kept)))
    return found


def _scores(logits: Tensor, ids: Tensor, spans: Tensor) -> Tensor:
    """Return for each passage the nats of its last word, and 1 if each of its tokens is the most likely one, else 0.

    ``logits`` (passages, n, vocab), ``ids`` (passages, n), ``spans`` (passages, 2); the result (passages, 2) is
    float64.
    """
    found, ids = list[Tensor](), ids.to(logits.device)
    for scores, tokens, (start, end) in zip(logits, ids, spans.tolist(), strict=True):
        scores, word = scores[start - 1 : end - 1].float(), tokens[start:end]
        right = (scores.argmax(-1) == word).all()
        found.append(torch.stack([F.cross_entropy(scores, word, reduction="sum"), right]))
    return torch.stack(found).double().cpu()
