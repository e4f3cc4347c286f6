"""Two models on the same windows: what one loses of the other, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lrc.errors import UserError
from lrc.evaluation.bootstrap import FEW, Estimate, mean, percentile, ratio
from lrc.evaluation.divergence import Divergence, divergence
from lrc.evaluation.folder import Loading, loaded
from lrc.evaluation.passage import Passage, passages
from lrc.evaluation.perplexity import (
    Advance,
    Keep,
    Perplexity,
    Progress,
    default_batch,
    measure,
    summarise,
    window_logits,
)
from lrc.hub.tokenizer import load_tokenizer
from lrc.run.processes import Ranks
from lrc.run.stopwatch import Stopwatch
from lrc.text.blocks import batched
from lrc.text.source import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lrc.evaluation.perplexity import Model

_TAIL = 0.99


@dataclass(frozen=True)
class TokenByToken:
    """What a model loses of another on the same tokens, each figure with a paired bootstrap interval over windows.

    ``perplexity_ratio``: its perplexity over the other's. ``kl_mean`` and ``kl_p99``: mean and 99th percentile over
    tokens of KL(other ‖ model) in nats. ``top1_agreement``: the share of tokens of which both think the same the
    likeliest.
    """

    perplexity_ratio: Estimate
    kl_mean: Estimate
    kl_p99: Estimate
    top1_agreement: Estimate


@dataclass(frozen=True)
class Pair:
    """Two models' figures on one text in windows of one length.

    ``tokens`` is None where their tokens do not compare, and ``refused`` then says why.
    """

    ours: Perplexity
    theirs: Perplexity
    tokens: TokenByToken | None = None
    refused: str | None = None

    @property
    def same_tokens(self) -> bool:
        """Whether both models read the text as the same tokens; perplexities, per token, compare only then."""
        return self.ours.ids_sha256 == self.theirs.ids_sha256

    @property
    def ratio_of(self) -> Literal["perplexity", "bits_per_byte"]:
        """What the ratio is of."""
        return "perplexity" if self.same_tokens else "bits_per_byte"

    @property
    def ratio(self) -> float | None:
        """Ours over theirs; None where it is of bits per byte and one of them has none."""
        if self.same_tokens:
            return self.ours.value / self.theirs.value
        ours, theirs = self.ours.bits_per_byte, self.theirs.bits_per_byte
        return ours / theirs if ours is not None and theirs else None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the ratio has to know."""
        if self.refused is not None:
            return (f"{self.ours.data}: {self.refused}{self._scored_bytes}",)
        if self.tokens and 1 < self.ours.windows < FEW:
            return (
                f"{self.ours.data}: {self.ours.windows} windows are few for an interval, which holds the truth less "
                f"often than it says below {FEW}",
            )
        return ()

    @property
    def _scored_bytes(self) -> str:
        """Over how much of the text the bits per byte are, where each model has windows of its own."""
        figures = [f for f in (self.ours, self.theirs) if f.bits_per_byte]
        if self.same_tokens or len(figures) < 2:
            return ""
        sizes = (round(f.nats / math.log(2) / f.bits_per_byte) for f in figures if f.bits_per_byte)
        return " over {:,} and {:,} bytes of the text".format(*sizes)


def evaluate_pair(
    folders: tuple[Path, Path],
    texts: Sequence[Text],
    seq_lens: Sequence[int],
    loading: Loading,
    *,
    max_windows: int | None = None,
    progress: Progress | None = None,
    keep: Keep | None = None,
    ranks: Ranks,
) -> list[Pair]:
    """A folder's model beside another's on each text in windows of each length, as ``passages`` cuts them.

    Both run on a batch of windows before the next, so that no more than that batch's logits are held. Where their
    tokens differ each is measured by itself; that is refused with a UserError where ``keep`` asks for tokens.
    """
    tokenizers = [load_tokenizer(f, trust_remote_code=loading.trust_remote_code) for f in folders]
    cut = [passages(tokenizer, texts, seq_lens, max_windows) for tokenizer in tokenizers]
    sides = [*zip(*cut, strict=True)]
    if keep and (differ := next((ours for ours, theirs in sides if not _same_ids(ours, theirs)), None)):
        raise UserError(
            f"{differ.data}: the tokenizers of {folders[0]} and {folders[1]} differ, so there are no results token by "
            "token to keep; leave --tokens out to compare bits per byte"
        )
    with loaded(folders, sum(map(len, tokenizers)), loading) as models:
        found = []
        for pair in sides:
            if (refused := _refusal(models, pair)) is not None:
                if keep:  # of a vocabulary, which only the models tell
                    raise UserError(f"{pair[0].data}: {refused}; leave --tokens out")
                ours, theirs = (
                    measure(
                        model, passage, progress=_begun(progress, passage, ranks), tokenizer=t, ranks=ranks
                    )
                    for model, passage, t in zip(models, pair, tokenizers, strict=True)
                )
                found.append(Pair(ours, theirs, refused=refused))
            else:
                advance = _begun(progress, pair[0], ranks)
                found.append(_compared(models, pair[0], tokenizers[0], advance, keep, ranks))
        return found


def _compared(
    models: Sequence[Model],
    passage: Passage,
    tokenizer: PreTrainedTokenizerBase,
    advance: Advance | None,
    keep: Keep | None,
    ranks: Ranks,
) -> Pair:
    watch = Stopwatch(models[0].device)
    parts = [*_batches(models, ranks.mine(passage.cut), advance, watch)]
    whole = Divergence(*(ranks.woven(torch.cat(column)) for column in zip(*parts, strict=True)))
    if keep:
        keep(passage, whole._asdict())
    ours, theirs = (
        summarise(nll, passage, model.dtype, seconds, tokenizer, ranks)
        for nll, model, seconds in zip(whole[:2], models, watch.seconds.values(), strict=True)
    )
    tokens = TokenByToken(
        ratio(whole.nll, whole.nll_against),
        mean(whole.kl),
        percentile(whole.kl, _TAIL),
        mean(whole.agree),
    )
    return Pair(ours, theirs, tokens)


def _batches(
    models: Sequence[Model], cut: Tensor, advance: Advance | None, watch: Stopwatch
) -> Iterator[Divergence]:
    """What both models make of windows (windows, n), batch by batch, on the host; first that of none."""
    size = min(default_batch(model, cut.shape[1]) for model in models)
    none = torch.empty(0, cut.shape[1] - 1)
    yield Divergence(none, none, none, none.bool())
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(closing(window_logits(model, cut, size))) for model in models)
        with watch.stage("ours"), watch.stage("theirs"):
            pass  # of no window both took no time
        for batch in batched(cut, size):
            with watch.stage("ours"):
                logits = next(ours)
            with watch.stage("theirs"):
                against = next(theirs)
            yield Divergence(*(column.cpu() for column in divergence(logits, against, batch)))
            del logits, against  # or they would wait beside the next
            if advance:
                advance(len(batch))


def _refusal(models: Sequence[Model], sides: tuple[Passage, Passage]) -> str | None:
    """Why two models' tokens do not compare; None where they do."""
    if not _same_ids(*sides):
        return (
            "the tokenizers differ, so perplexities and windows are of different tokens and are not compared token by "
            "token; the ratio is of bits per byte"
        )
    ours, theirs = (model.config.get_text_config().vocab_size for model in models)
    if ours != theirs:
        return f"the vocabularies have {ours:,} and {theirs:,} entries, so no distributions over them are compared"
    return None


def _same_ids(ours: Passage, theirs: Passage) -> bool:
    return torch.equal(ours.ids, theirs.ids)


def _begun(progress: Progress | None, passage: Passage, ranks: Ranks) -> Advance | None:
    return progress(passage.data, len(ranks.mine(passage.cut))) if progress else None
