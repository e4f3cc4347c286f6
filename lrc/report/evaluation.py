"""Evaluations as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from lrc.evaluation.bootstrap import RESAMPLES, Estimate
from lrc.evaluation.pair import Pair
from lrc.evaluation.perplexity import Perplexity
from lrc.evaluation.tasks import TaskScore
from lrc.records.comparison import Comparison, Evaluated
from lrc.records.number import number
from lrc.report.table import Table, table
from lrc.report.tables import listed, warning_lines

if TYPE_CHECKING:
    from rich.console import RenderableType


def evaluation_tables(comparison: Comparison) -> Iterator[RenderableType]:
    """Yield perplexity and scores on tasks of one model, or of two with their ratios."""
    of, against = comparison.of, comparison.against
    yield f"model: {of.model}"
    if against is not None:
        yield f"against: {against.model}"
    if of.perplexity:
        yield (_perplexity(of) if against is None else _ratios(comparison.pairs)).on_screen()
    if any(pair.tokens for pair in comparison.pairs):
        yield _token_by_token(comparison.pairs).on_screen()
        yield f"95 % intervals in brackets: {RESAMPLES:,} resamples of whole windows, both models' together"
    if of.tasks:
        yield _tasks(of, against).on_screen()
        yield listed(comparison.versions)
    yield from warning_lines(comparison.notes)


def _perplexity(of: Evaluated) -> Table:
    return table(
        {
            "text": p.data,
            "perplexity:n": number(p.value, 5),
            "bits per byte:n": "" if p.bits_per_byte is None else f"{p.bits_per_byte:.4f}",
            "windows:n": str(p.windows),
            "seq_len:n": str(p.seq_len),
            "dtype": p.dtype,
            "tokens/s:n": f"{p.tokens_per_second:,.0f}",
        }
        for p in of.perplexity
    )


def _ratios(pairs: Iterable[Pair]) -> Table:
    rows = []
    for pair in pairs:
        both = (pair.ours, pair.theirs)
        ours, theirs = (number(p.value, 5) if pair.same_tokens else _bits(p) for p in both)
        # A setting that both share stands once.
        windows, seq_len, dtype = (
            ", ".join(dict.fromkeys(str(getattr(p, key)) for p in both))
            for key in ("windows", "seq_len", "dtype")
        )
        rows.append(
            {
                "text": pair.ours.data,
                "model:n": ours,
                "against:n": theirs,
                "ratio:n": "" if pair.ratio is None else f"{pair.ratio:.4f}",
                "windows:n": windows,
                "seq_len:n": seq_len,
                "dtype": dtype,
            }
        )
    return table(rows)


def _tasks(of: Evaluated, against: Evaluated | None) -> Table:
    """Return scores with standard errors, and beside them another model's scores and the differences."""
    others = {(s.task, s.metric, s.filter): s for s in (against.tasks if against else [])}
    rows = []
    for score in of.tasks:
        name = score.metric if score.filter == "none" else f"{score.metric}, {score.filter}"
        better = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
        row = {
            "task": score.task,
            "metric": f"{name}{better}",
            "shots:n": "" if score.shots is None else str(score.shots),
            "documents:n": _documents(score),
            "version:n": score.version or "",
            "model:n": _score(score),
        }
        if other := others.get((score.task, score.metric, score.filter)):
            row |= {"against:n": _score(other), "difference:n": f"{score.value - other.value:+.4f}"}
        rows.append(row)
    return table(rows)


def _documents(score: TaskScore) -> str:
    if score.documents is None:
        return ""
    limited = score.documents != score.all_documents
    return f"first {score.documents} of {score.all_documents}" if limited else str(score.documents)


def _score(score: TaskScore) -> str:
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")


def _token_by_token(pairs: Iterable[Pair]) -> Table:
    return table(
        {
            "text": pair.ours.data,
            "seq_len:n": str(pair.ours.seq_len),
            "perplexity ratio:n": _interval(found.perplexity_ratio, "{:.4f}".format),
            "KL, mean:n": _interval(found.kl_mean, number),
            "KL, 99 %:n": _interval(found.kl_p99, number),
            "top-1 agreement:n": _interval(found.top1_agreement, "{:.2%}".format),
        }
        for pair in pairs
        if (found := pair.tokens)
    )


def _interval(estimate: Estimate, form: Callable[[float], str]) -> str:
    ends = [end for end in (estimate.low, estimate.high) if end is not None]
    within = f"\n[{', '.join(form(end) for end in ends)}]" if ends else ""
    return f"{form(estimate.value)}{within}"


def _bits(p: Perplexity) -> str:
    bits = "" if p.bits_per_byte is None else f" ({p.bits_per_byte:.4f} bits per byte)"
    return f"{number(p.value, 5)}{bits}"
