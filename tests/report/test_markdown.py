"""The page for a pull request: short at first sight, whole when unfolded, tables that stay tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lrc.report.markdown import model_card, report_page
from lrc.report.report import Report


def test_what_matters_comes_first_and_the_plan_last(make_report: Callable[..., Report]) -> None:
    report = make_report(warnings=["too few samples"])
    page = report_page(report)
    places = [page.index(told) for told in (report.sentence, "too few samples", "| parameters |", "```yaml")]
    assert places == sorted(places)
    assert page.count("too few samples") == 1
    assert f"- Model: llama-7b, revision {report.revision}, fingerprint {report.fingerprint}" in page
    assert page.count("<details>") == page.count("</details>") == 2
    assert report.plan_text in page


def test_a_name_with_a_bar_breaks_no_table(worst: Report) -> None:
    change = worst.perplexity[1]
    named = replace(change, before=replace(change.before, data="a|b.txt"))
    page = report_page(replace(worst, perplexity=[named]))
    (row,) = [line for line in page.splitlines() if line.startswith("| perplexity")]
    assert row.replace("\\|", "").count("|") == 5


def test_the_card_has_the_plan_as_it_was_written(make_report: Callable[..., Report]) -> None:
    report = make_report()
    assert f"```yaml\n{report.plan_text}```" in model_card(report)
