"""Evaluate two models on the same windows and compare them token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lrc.errors import UserError
from lrc.evaluation.bootstrap import Estimate, caveat, mean, percentile, ratio
from lrc.evaluation.folder import Loading, loaded
from lrc.evaluation.passage import Passage, passages
from lrc.evaluation.perplexity import (
    Model,
    Perplexity,
    TokenWriter,
    default_batch,
    measure,
    steps,
    summarise,
    window_logits,
)
from lrc.evaluation.tokens import Divergence, divergence
from lrc.hub.loader import causal_config, first_token, load_tokenizer
from lrc.run.settings import Run
from lrc.run.stopwatch import Stopwatch
from lrc.text.blocks import batched
from lrc.text.mixture import about
from lrc.text.source import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAIL = 0.99


@dataclass(frozen=True)
class TokenByToken:
    """Hold the comparison of a model with a reference, each figure with a paired bootstrap interval over windows.

    ``perplexity_ratio``: the model's perplexity over the reference's. ``kl_mean`` and ``kl_p99``: mean and 99th
    percentile over tokens of KL(reference ‖ model) in nats. ``top1_agreement``: the share of tokens for which both have
    the same most likely token.
    """

    perplexity_ratio: Estimate
    kl_mean: Estimate
    kl_p99: Estimate
    top1_agreement: Estimate

    def notes(self, measured: Perplexity) -> tuple[str, ...]:
        """Return the caveats of the intervals, given the perplexity of the same windows."""
        found = caveat(measured.windows)
        return (f"{measured.data}: {found}",) if found else ()


@dataclass(frozen=True)
class Pair:
    """Hold two models' figures on one text in windows of one length.

    ``tokens`` is None if the models cannot be compared token by token; ``refused`` then says why.
    """

    ours: Perplexity
    theirs: Perplexity
    tokens: TokenByToken | None = None
    refused: str | None = None

    @property
    def same_tokens(self) -> bool:
        """Tell whether both models tokenize the text alike; only then can perplexities be compared."""
        return self.ours.ids_sha256 == self.theirs.ids_sha256

    @property
    def ratio_of(self) -> Literal["perplexity", "bits_per_byte"]:
        """Name the figure that ``ratio`` compares."""
        return "perplexity" if self.same_tokens else "bits_per_byte"

    @property
    def ratio(self) -> float | None:
        """Return ours over theirs; None if a model has no bits per byte to compare."""
        if self.same_tokens:
            return self.ours.value / self.theirs.value
        ours, theirs = self.ours.bits_per_byte, self.theirs.bits_per_byte
        return ours / theirs if ours is not None and theirs else None

    @property
    def notes(self) -> tuple[str, ...]:
        if self.refused is not None:
            return (f"{self.ours.data}: {self.refused}",)
        return self.tokens.notes(self.ours) if self.tokens else ()


def evaluate_pair(
    folders: tuple[Path, Path],
    texts: Sequence[Text],
    seq_lens: Sequence[int],
    loading: Loading,
    *,
    max_windows: int | None = None,
    keep: TokenWriter | None = None,
) -> list[Pair]:
    """Load two folders' models and compare them on each text in windows of each length: ``LoadedPair.compare``."""
    with loaded_pair(folders, texts, seq_lens, loading, max_windows=max_windows, keep=keep) as pair:
        return pair.compare()


@dataclass(frozen=True)
class LoadedPair:
    """Hold two models with their tokenizers, and each text as cut for either."""

    models: list[Model]
    tokenizers: list[PreTrainedTokenizerBase]
    sides: list[tuple[Passage, Passage]]
    run: Run
    keep: TokenWriter | None

    def compare(self) -> list[Pair]:
        """Compare the models on each text.

        Both models run on a batch before the next one, so that only one batch's logits are in memory. Models with
        different tokenizers or vocabularies are measured separately; with ``keep`` they raise UserError.
        """
        found = []
        for pair in self.sides:
            if (refused := _refusal(self.models, pair)) is None:
                found += self.on(pair[:1], pair[0].data)
                continue
            if self.keep:  # only now known: the vocabularies differ
                raise UserError(f"{pair[0].data}: {refused}; leave --tokens out")
            each = zip(self.models, pair, self.tokenizers, strict=True)
            ours, theirs = (measure(*side, self.run) for side in each)
            found.append(Pair(ours, theirs, refused=refused))
        return found

    def on(self, passages: Sequence[Passage], label: str) -> list[Pair]:
        """Compare the models on passages, which both tokenize alike and whose windows have one length.

        The windows of all run one after another, as one stage of progress: a streamed model is read once.
        """
        if not passages:
            return []
        cut, counts = torch.cat([passage.cut for passage in passages]), [len(p.cut) for p in passages]
        whole, seconds = self._run_both(cut, label)
        parts = zip(*(column.split(counts) for column in whole), strict=True)
        return [
            self._pair(passage, Divergence(*part), [each * len(passage.cut) / len(cut) for each in seconds])
            for passage, part in zip(passages, parts, strict=True)
        ]

    def _run_both(self, cut: Tensor, label: str) -> tuple[Divergence, list[float]]:
        """Run both models on windows (windows, n), one batch after another; return results and seconds of each."""
        watch, processes = Stopwatch(self.models[0].device), self.run.processes
        mine, seq_len = processes.mine(cut), cut.shape[1]
        size = min(default_batch(model, seq_len) for model in self.models)
        # a step for both models' windows
        total = sum(steps(model, len(mine)) for model in self.models) - len(mine)
        advance = self.run.stage(label, total)
        none = torch.empty(0, seq_len - 1)
        parts = [Divergence(none, none, none, none.bool())]  # a process may have no windows
        with ExitStack() as stack:
            ours, theirs = (
                stack.enter_context(closing(window_logits(model, mine, size, advance)))
                for model in self.models
            )
            with watch.stage("ours"), watch.stage("theirs"):
                pass  # both stages exist even without a window
            for batch in batched(mine, size):
                with watch.stage("ours"):
                    logits = next(ours)
                with watch.stage("theirs"):
                    against = next(theirs)
                parts.append(Divergence(*(column.cpu() for column in divergence(logits, against, batch))))
                del logits, against  # frees them before the next batch
                advance(len(batch))
        whole = Divergence(*(processes.gather_rows(torch.cat(column)) for column in zip(*parts, strict=True)))
        return whole, [*watch.seconds.values()]

    def _pair(self, passage: Passage, whole: Divergence, seconds: Sequence[float]) -> Pair:
        """Return the figures of a passage from the results on its windows."""
        if self.keep:
            self.keep(passage, whole._asdict())
        ours, theirs = (
            summarise(nll, passage, model.dtype, spent, self.tokenizers[0], self.run.processes)
            for nll, model, spent in zip(whole[:2], self.models, seconds, strict=True)
        )
        tokens = TokenByToken(
            ratio(whole.nll, whole.nll_against),
            mean(whole.kl),
            percentile(whole.kl, _TAIL),
            mean(whole.agree),
        )
        return Pair(ours, theirs, tokens)


@contextmanager
def loaded_pair(
    folders: tuple[Path, Path],
    texts: Sequence[Text],
    seq_lens: Sequence[int],
    loading: Loading,
    *,
    max_windows: int | None = None,
    keep: TokenWriter | None = None,
) -> Iterator[LoadedPair]:
    """Cut texts by ``passages``, load two folders' models, and free them when the context closes.

    ``keep`` gets each passage with its results by token. Raises UserError if it is given and the tokenizers differ.
    """
    run = loading.run
    tokenizers = [load_tokenizer(f, trust_remote_code=run.trust_remote_code) for f in folders]
    cut = []
    for folder, tokenizer in zip(folders, tokenizers, strict=True):
        config = causal_config(folder, trust_remote_code=run.trust_remote_code)
        with about(f"{folder}"):
            rows, first = config.get_text_config().vocab_size, first_token(config, tokenizer)
            cut.append(passages(tokenizer, texts, seq_lens, max_windows, rows, first))
    sides = [(ours, theirs) for ours, theirs in zip(*cut, strict=True)]
    differ = next((ours for ours, theirs in sides if not torch.equal(ours.ids, theirs.ids)), None)
    if keep and differ:
        raise UserError(
            f"{differ.data}: the tokenizers of {folders[0]} and {folders[1]} differ, so they cannot be compared token "
            "by token; leave --tokens out to compare bits per byte"
        )
    with loaded(folders, sum(map(len, tokenizers)), loading) as models:
        yield LoadedPair(models, tokenizers, sides, run, keep)


def _refusal(models: Sequence[Model], sides: tuple[Passage, Passage]) -> str | None:
    """Say why two models cannot be compared token by token; None if they can."""
    if not torch.equal(sides[0].ids, sides[1].ids):
        return "the tokenizers differ, so the models are not compared token by token; the ratio is of bits per byte"
    ours, theirs = (model.config.get_text_config().vocab_size for model in models)
    if ours != theirs:
        return f"the vocabularies have {ours:,} and {theirs:,} entries, so distributions are not compared"
    return None
