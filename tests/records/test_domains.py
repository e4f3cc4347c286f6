"""A domain is lost if the original knows it and the output pays far more for it than for another."""

from __future__ import annotations

import pytest

from lrc.evaluation.perplexity import Perplexity
from lrc.records.compression import Domains, PerplexityChange


def change(name: str, before: float, after: float, bits: float = 1.0) -> PerplexityChange:
    old, new = (
        Perplexity(name, value, 1.0, 10, 10, 1, 11, "float32", bits, 1, "ab", 1.0, 10.0)
        for value in (before, after)
    )
    return PerplexityChange(old, new)


def found(*changes: PerplexityChange) -> list[str]:
    return [each.before.data for each in Domains([*changes], []).lost]


@pytest.mark.parametrize(("after", "lost"), [(14.9, False), (15.1, True)])
def test_perplexity_must_rise_by_more_than_half(after: float, lost: bool) -> None:
    others = [change("web", 10, 11), change("code", 10, 11.5), change("chat", 10, 12)]
    assert found(*others, change("German", 10, after)) == ["German"] * lost


@pytest.mark.parametrize(("after", "lost"), [(39, False), (41, True)])
def test_and_far_more_than_where_it_rises_least(after: float, lost: bool) -> None:
    others = [change("web", 10, 20), change("code", 10, 20), change("chat", 10, 22)]
    assert found(*others, change("German", 10, after)) == ["German"] * lost


@pytest.mark.parametrize(("bits", "lost"), [(1.2, True), (1.3, False)])
def test_the_original_must_know_it(bits: float, lost: bool) -> None:
    others = [change("web", 10, 11), change("code", 10, 11), change("chat", 10, 11)]
    assert found(*others, change("German", 70, 700, bits)) == ["German"] * lost


def test_a_warning_names_it() -> None:
    domains = Domains([change("web", 10, 11), change("chat", 10, 11), change("code", 4, 16)], [])
    (warning,) = domains.warnings
    assert warning.startswith("code is largely forgotten: perplexity rises from 4 to 16, × 4.000; ")
    assert domains.summary == "By domain it is from × 1.100 (web) to × 4.000 (code)."


def test_without_domains_nothing_is_said() -> None:
    assert (found(), Domains([], []).warnings, Domains([], []).summary) == ([], [], "")
