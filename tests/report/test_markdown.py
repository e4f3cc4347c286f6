"""The page for a pull request: short at first sight, whole when unfolded, tables that stay tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lrc.records.compression import Report
from lrc.report.compression import error_note, html_page, model_card, report_page


def test_what_matters_comes_first_and_the_plan_last(make_report: Callable[..., Report]) -> None:
    report = make_report(warnings=["too few samples"])
    page = report_page(report)
    places = [page.index(told) for told in (report.sentence, "too few samples", "| parameters |", "```yaml")]
    assert places == sorted(places)
    assert page.count("too few samples") == 1
    assert f"- Revision: {report.revision}\n- Fingerprint: {report.fingerprint}\n" in page
    assert page.count("<details>") == page.count("</details>") == 1
    assert report.plan_text in page


def test_a_name_with_a_bar_breaks_no_table(worst: Report) -> None:
    change = worst.perplexity[1]
    named = replace(change, before=replace(change.before, data="a|b.txt"))
    page = report_page(replace(worst, perplexity=[named]))
    (row,) = [line for line in page.splitlines() if line.startswith("| perplexity")]
    assert row.replace("\\|", "").count("|") == 6
    (answer,) = [line for line in page.splitlines() if line.startswith("| <b>Why")]
    assert answer.replace("\\|", "").count("|") == 4


def test_intervals_and_answers_are_on_the_page_and_on_the_card(make_report: Callable[..., Report]) -> None:
    report = make_report()
    for page in (report_page(report), model_card(report)):
        for told in (
            "| 5.47 | 6.81 | 1.245 | 1.235 to 1.255 |",
            "| KL divergence from the original, nats per token, wikitext2:test |  | 0.123 |  | 0.12 to 0.127 |",
            "| same top token as the original, wikitext2:test |  | 87.1% |  | 86.9% to 87.3% |",
            "| Why? | Because light is scattered. | The sky … |",
            "no answers to 'Who?'",
        ):
            assert told in page


def test_errors_are_explained_where_there_are_such(make_report: Callable[..., Report]) -> None:
    records = make_report().targets
    whole = error_note([*records, replace(records[1], target="embed", layer=None)])
    sentences = (
        "Nats KL are",
        "predicted for qk, of the attention scores",
        "those of an embedding and a head",
    )
    assert all(sentence in whole for sentence in sentences)
    alone = error_note([record for record in records if record.target == "ov"])
    assert not any(sentence in alone for sentence in sentences)
    assert alone.endswith("a relative error, root mean square over the layers, of the target's output.")


def test_stages_that_did_not_run_are_left_out(make_report: Callable[..., Report]) -> None:
    report = make_report(seconds={"load": 0.5, "gradients": 7e-5, "write": 0.002})
    assert report.stages == {"load": 0.5, "write": 0.002}
    for page in (report_page(report), html_page(report)):
        assert "gradients" not in page.replace("gradient_samples", "")
    assert "| load | 0.50 | 99.6% |\n| write | 0.00 | 0.4% |\n" in report_page(report)


def test_the_card_has_the_plan_as_it_was_written(make_report: Callable[..., Report]) -> None:
    report = make_report()
    assert f"```yaml\n{report.plan_text}```" in model_card(report)


README = "---\nlicense: other\nlicense_name: mine\nbase_model: a/b\n---\n# A model\n"
APACHE = "\n     Apache License\n   Version 2.0, January 2004\n"


@pytest.mark.parametrize(
    ("files", "stated"),
    [
        ({}, {}),
        ({"README.md": README, "LICENSE": APACHE}, {"license": "other", "license_name": "mine"}),
        ({"README.md": "# No front matter\n", "LICENSE": APACHE}, {"license": "apache-2.0"}),
        ({"README.md": "---\n: [broken\n---\n", "LICENSE": "MIT License\n\nCopyright"}, {"license": "mit"}),
        ({"LICENSE": "All rights reserved"}, {}),
    ],
)
@pytest.mark.parametrize("revision", [None, "0123abc"])
def test_the_card_states_what_the_hub_reads(
    make_report: Callable[..., Report],
    tmp_path: Path,
    files: dict[str, str],
    stated: dict[str, Any],
    revision: str | None,
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    card = model_card(make_report(model="org/name: 1", revision=revision), tmp_path)
    _, front, body = card.split("---\n", 2)
    base = {"base_model": "org/name: 1"} if revision else {}
    known = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["lrc", "compressed"]}
    assert yaml.safe_load(front) == {**known, **base, **stated}
    assert "pip install lrc" in body
    assert "import lrc" in body
