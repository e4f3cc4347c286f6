"""A domain is much worse if the original predicts it well and the output pays far more for it than for another."""

from __future__ import annotations

import math

import pytest

from lrc.evaluation.perplexity import Perplexity
from lrc.records.compression import Domains, PerplexityChange


def change(before: float, after: float, bits: float = 1.0) -> PerplexityChange:
    old, new = (
        Perplexity("text", value, 1.0, 10, 10, 1, 11, "float32", bits, 1, "ab", 1.0, 10.0)
        for value in (before, after)
    )
    return PerplexityChange(old, new)


def worse(**changes: PerplexityChange) -> list[str]:
    return Domains(changes).much_worse


@pytest.mark.parametrize(("after", "told"), [(14.9, False), (15.1, True)])
def test_perplexity_must_rise_by_more_than_half(after: float, told: bool) -> None:
    others = {"web": change(10, 11), "code": change(10, 11.5), "chat": change(10, 12)}
    assert worse(**others, german=change(10, after)) == ["german"] * told


@pytest.mark.parametrize(("after", "told"), [(31, False), (33, True)])
def test_and_far_more_than_where_it_rises_least(after: float, told: bool) -> None:
    others = {"web": change(10, 18), "code": change(10, 18), "chat": change(10, 22)}
    assert worse(**others, german=change(10, after)) == ["german"] * told


def test_four_times_is_much_worse_wherever() -> None:
    everywhere = {"web": change(10, 500), "code": change(10, 700)}
    assert worse(**everywhere) == ["web", "code"]
    assert worse(web=change(10, 41)) == ["web"]


def test_what_is_no_number_is_the_worst() -> None:
    broken = Domains({"code": change(4, math.nan), "web": change(10, 11), "chat": change(10, 12)})
    assert broken.much_worse == ["code"]
    assert broken.summary == "By domain, perplexity rises × 1.100 (web) to × inf (code)."
    assert "code: perplexity rises from 4 to nan" in broken.warnings[0]


@pytest.mark.parametrize(("bits", "told"), [(1.2, True), (1.3, False)])
def test_the_original_must_predict_it_well(bits: float, told: bool) -> None:
    others = {"web": change(10, 11), "code": change(10, 11), "chat": change(10, 11)}
    assert worse(**others, german=change(70, 700, bits)) == ["german"] * told


def test_a_warning_names_it() -> None:
    domains = Domains({"web": change(10, 11), "chat": change(10, 11), "code": change(4, 16)})
    (warning,) = domains.warnings
    assert warning.startswith("code: perplexity rises from 4 to 16, × 4.000; ")
    assert domains.summary == "By domain, perplexity rises × 1.100 (web) to × 4.000 (code)."


def test_without_domains_nothing_is_said() -> None:
    assert (worse(), Domains().warnings, Domains().summary) == ([], [], "")
    assert Domains({"web": change(10, 11)}).summary == "By domain, perplexity rises × 1.100 (web)."
