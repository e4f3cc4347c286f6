"""Measure what a compression costs: perplexity, domains, last words and answers, before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lrc.checkpoint.staging import SharedStaging
from lrc.errors import UserError
from lrc.estimate.room import memory_advice
from lrc.evaluation.answers import Answers, write_answers
from lrc.evaluation.domains import domain_passages
from lrc.evaluation.folder import Loading
from lrc.evaluation.last_words import LastWords, find_passages, last_words
from lrc.evaluation.pair import Pair, loaded_pair
from lrc.evaluation.passage import DEFAULT_SEQ_LEN, Passage, choose_seq_lens, count_windows
from lrc.evaluation.texts import evaluation_texts
from lrc.plan.job import Job
from lrc.records.compression import Domains, PerplexityChange
from lrc.text.blocks import tokenize
from lrc.text.mixture import about
from lrc.text.source import Text
from lrc.verbs.setup import Setup


@dataclass(frozen=True)
class CostTexts:
    """What an output is evaluated on, read before the compression so that a fault in it costs no time.

    ``domains``, of which others are ``skipped`` with a reason, and ``passages`` of LAMBADA. All are empty if nothing is
    evaluated.
    """

    texts: list[Text]
    max_windows: int | None
    domains: list[Passage] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    passages: list[str] = field(default_factory=list)

    @property
    def key(self) -> dict[str, Any]:
        """What every process must have read alike."""
        return {"evaluation texts": [text.sha256 for text in self.texts], "passages": self.passages}


def read_cost_texts(setup: Setup, ppl: str | Sequence[str] | None, max_windows: int | None) -> CostTexts:
    """Read what the output is evaluated on. Raises UserError for a missing or short text."""
    shape, data_folder = setup.reader.architecture, setup.run.data_folder
    texts = evaluation_texts(setup.model.source, ppl, data_folder)
    for text in texts:
        with about(text.label):
            ids = tokenize(setup.tokenizer, text.text, shape.vocab, setup.first)
        count_windows(text, ids, min(DEFAULT_SEQ_LEN, shape.positions), max_windows, setup.first)
    if not texts:
        return CostTexts(texts, max_windows)
    # The built-in models are far too small to predict a last word.
    passages = [] if setup.model.builtin else find_passages(data_folder)[:max_windows]
    limits = shape.vocab, shape.positions, max_windows, setup.first
    domains, skipped = domain_passages(setup.tokenizer, *limits)
    return CostTexts(texts, max_windows, domains, skipped, passages)


@dataclass(frozen=True)
class Cost:
    """What the evaluation found, as fields of the report."""

    perplexity: list[PerplexityChange]
    domains: Domains
    last_words: LastWords | None
    answers: Answers | None


def measure_cost(setup: Setup, job: Job, stage: SharedStaging, evaluated: CostTexts) -> Cost:
    """Compare the published checkpoint with the original; answers on rank 0 alone."""
    advice = "the same command with --no-eval, then lrc eval with --streamed: the checkpoint is finished"

    def progress(label: str, total: int) -> Callable[[int], object]:
        return setup.run.stage(f"before and after: {label}", total)

    loading = Loading(setup.device, setup.dtype, stage.scratch, replace(setup.run, progress=progress))
    lengths = choose_seq_lens([("the model", job.reader.config)], None)
    folders, answers = (stage.out, job.model.path), None
    with (
        setup.watch.stage("evaluate"),
        memory_advice(advice),
        loaded_pair(folders, evaluated.texts, lengths, loading, max_windows=evaluated.max_windows) as pair,
    ):
        changes = [_change(each) for each in pair.compare()]
        if wrong := next((each.before for each in changes if not math.isfinite(each.before.nats)), None):
            raise UserError(f"{wrong.data}: the original's loss is NaN or inf; try --dtype float32")
        by_domain = {each.ours.data: _change(each) for each in pair.on(evaluated.domains, "domains")}
        words = last_words(pair.models, pair.tokenizers[0], evaluated.passages, loading.run, setup.first)
        if setup.processes.first:
            answers = write_answers(pair.models[::-1], folders[::-1], pair.tokenizers[0], loading)
    return Cost(changes, Domains(by_domain, evaluated.skipped), words, answers)


def _change(pair: Pair) -> PerplexityChange:
    return PerplexityChange(pair.theirs, pair.ours, pair.tokens)
