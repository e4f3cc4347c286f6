"""The page of a report: it says what the record says, escapes what users name, and needs nothing but itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest

from lrc.records.compression import Domains, Report
from lrc.report.compression import html_page, report_page
from lrc.report.outputs import Output

MakeReport = Callable[..., Report]
_EMPTY = {"meta", "path", "use", "rect"}  # of which only those of HTML need no end; SVG's end themselves


class Page(HTMLParser):
    """What a page is made of: its elements with their attributes, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.words += data

    def has(self, sentence: str) -> bool:
        return " ".join(sentence.split()) in " ".join(self.words.split())


@pytest.fixture(params=["plain", "worst"])
def page(request: pytest.FixtureRequest, make_report: MakeReport, worst_page: str) -> str:
    return html_page(make_report()) if request.param == "plain" else worst_page


def test_a_page_is_whole_and_needs_nothing_but_itself(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "link", "img", "iframe", "image", "object", "foreignobject"}
    for tag, attributes in parsed.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                assert value is not None
                assert value.startswith("#"), (tag, value)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style


def test_ids_stand_once_and_what_refers_to_one_finds_it(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_what_users_name_is_escaped(worst: Report, worst_page: str) -> None:
    assert "<script" not in worst_page
    assert not re.search(r"<(b|i)>", worst_page)
    parsed = Page(worst_page)
    for told in (worst.model, worst.plan, worst.plan_text, *worst.warnings, worst.out):
        assert parsed.has(told)
    assert worst.perplexity[2].before.data in unescape(worst_page)


def test_what_was_done_is_said_in_a_sentence(make_report: MakeReport) -> None:
    assert Page(html_page(make_report())).has(
        "llama-7b was compressed by the plan a3-2x to 50.0% of its decoder's weights: 6.519 GiB instead of 12.55 GiB. "
        "Perplexity is 6.81 instead of 5.47 on wikitext2:test, × 1.245 (95 % interval 1.235 to 1.255). "
        "By domain, perplexity rises × 1.100 (chat) to × 4.000 (code)."
    )


def test_several_texts_and_the_domains_are_in_the_sentence(make_report: MakeReport) -> None:
    (first,) = make_report().perplexity
    old, new = (
        replace(p, data="c4:validation", value=v) for p, v in ((first.before, 7.0), (first.after, 9.1))
    )
    report = make_report(perplexity=[first, replace(first, before=old, after=new)])
    for told in (
        "Perplexity is 6.81 instead of 5.47 on wikitext2:test, × 1.245 (",
        "; 9.1 instead of 7 on c4:validation, × 1.300 (",
    ):
        assert told in report.sentence
    without = make_report(domains=Domains({}, ["domain web is not measured: no"]))
    assert without.sentence.endswith("1.255).")


def test_domains_and_last_words_are_shown(make_report: MakeReport) -> None:
    report = make_report()
    page = Page(html_page(report))
    for told in (
        "Perplexity by domain",
        "code: much worse",
        "domain german is not measured: no file",
        "worst domain, code",
        "LAMBADA, 498 of the first 500 passages, last word: perplexity",
        "LAMBADA, 498 of the first 500 passages, last word: accuracy",
        "-5.0 to -1.0 points",
    ):
        assert page.has(told), told
        assert told in report_page(report) or told.startswith("worst")


def test_few_windows_stand_beside_the_headline(make_report: MakeReport) -> None:
    report = make_report()
    change = report.perplexity[0]
    two = replace(change, before=replace(change.before, windows=2), after=replace(change.after, windows=2))
    page = Page(html_page(replace(report, perplexity=[two])))
    assert page.has(
        "6.81 instead of 5.47 on wikitext2:test, × 1.245 (95 % interval 1.235 to 1.255, 2 windows only)."
    )
    assert page.has("5.47 to 6.81 (95 % interval 1.235 to 1.255, 2 windows only)")
    assert page.has("wikitext2:test: 2 windows are few")


def test_one_window_has_no_interval_and_the_page_says_so(make_report: MakeReport) -> None:
    report = make_report()
    change = report.perplexity[0]
    assert change.tokens is not None
    figures = {name: replace(each, low=None, high=None) for name, each in vars(change.tokens).items()}
    one = replace(change, before=replace(change.before, windows=1), tokens=replace(change.tokens, **figures))
    page = Page(html_page(replace(report, perplexity=[one])))
    assert page.has("6.81 instead of 5.47 on wikitext2:test, × 1.245 (1 window only).")
    assert page.has("none: 1 window")
    assert page.has("wikitext2:test: one window is measured, so the figures have no interval")


def test_divergence_and_answers_are_shown(make_report: MakeReport, worst: Report, worst_page: str) -> None:
    page = Page(html_page(make_report()))
    for told in (
        "87.1%KL divergence 0.123 nats per token",
        "1.235 to 1.255",
        "0.12 to 0.127",
        "86.9% to 87.3%",
        "Prompts through the chat template",
        "Because light is scattered.",
        "The sky …",
        "no answers to 'Who?': the tokenizer fails (KeyError: 'role')",
    ):
        assert page.has(told), told
    assert worst.answers is not None
    assert Page(worst_page).has(worst.answers.skipped[0])
    assert Page(worst_page).has("``` ↵ # <script>alert(1)</script> | \ufffd[31mred\ufffd")
    assert "same top token" not in html_page(make_report(perplexity=[], domains=Domains()))


def test_provenance_is_whole(make_report: MakeReport) -> None:
    report = make_report(processes=4, allocation={"allocation": "energy", "cost": 0.25})
    page = Page(html_page(report))
    assert report.revision is not None
    for told in (
        report.revision,
        report.fingerprint,
        *(f"{name} {version}" for name, version in report.versions.items()),
        "seed 0",
        report.calibration.ids_sha256,
        str(report.calibration.sources[0].text_sha256),
        report.perplexity[0].before.ids_sha256,
        "protocol 1",
        "4 processes",
        "allocation energy, cost 0.25",
        report.plan_text,
    ):
        assert page.has(told), told


def pictures(page: str) -> list[str]:
    return re.findall(r'data-picture="([^"]+)"', page)


def test_each_text_has_a_picture(make_report: MakeReport, worst: Report) -> None:
    assert pictures(html_page(make_report())) == ["cost-0", "kept"]
    assert [name for name in pictures(html_page(worst)) if name.startswith("cost")] == [
        "cost-0",
        "cost-1",
        "cost-2",
    ]


def test_without_an_evaluation_the_page_says_so(make_report: MakeReport) -> None:
    page = html_page(make_report(perplexity=[]))
    assert "cost-0" not in pictures(page)
    assert Page(page).has("Perplexity was not measured; lrc eval does it.")


def test_a_plan_that_changes_nothing_has_a_page(make_report: MakeReport) -> None:
    page = html_page(make_report(targets=[], refits=[], scale=None, warnings=[]))
    assert pictures(page) == ["cost-0"]
    assert "Warnings" not in page
    assert "Residual stream" not in page


def test_figures_that_are_none_are_told_beside_the_pictures(worst_page: str) -> None:
    page = Page(worst_page)
    assert page.has("is inf, which has no place in the picture")


def test_sizes_say_what_they_are_of(make_report: MakeReport) -> None:
    report = make_report()
    page = html_page(report)
    assert '<td class="n m">64 per head</td>' in page
    assert '<td class="n m">64 neurons</td>' in page
    assert "at the right the rank, for mlp the neurons." in page
    for cell in ("KV cache, bytes per token", "524,288", "262,144"):
        assert f">{cell}</td>" in page
    others = html_page(make_report(targets=[replace(report.targets[0], target="q", method="svd")]))
    assert "neurons" not in others


def test_memory_of_the_device_is_there_where_there_is_one(make_report: MakeReport) -> None:
    assert "device memory" not in html_page(make_report())
    page = html_page(make_report(device_bytes={"load": 2**30, "solve": 3 * 2**30}))
    assert Page(page).has("3 GiB")


def test_other_outputs_stand_beside_it_on_the_same_text_alone(make_report: MakeReport) -> None:
    report, near = make_report(), make_report(plan="near")
    figure = report.perplexity[0]
    shorter = replace(
        figure, before=replace(figure.before, windows=9), after=replace(figure.after, windows=9)
    )
    far = make_report(perplexity=[shorter])
    beside = [Output("llama-7b-near", "near", near), Output("llama-7b-far", "far", far)]
    page = html_page(report, beside)
    assert re.search(r"<text[^>]*>near</text>", page)
    assert not re.search(r"<text[^>]*>far</text>", page)
    assert pictures(page).count("cost-0") == 1
    assert "cost-1" not in pictures(page)


def test_the_same_report_has_the_same_page(worst: Report, worst_page: str) -> None:
    assert html_page(worst) == worst_page
