"""Sizes: what a fraction comes to is legal, near to what was asked, and never larger than the whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lrc.families import Matrix, Target
from lrc.methods.sizes import ComponentRank, PairRank, most

KEEPS = st.floats(min_value=0.001, max_value=1)


@st.composite
def components(draw: st.DrawFn) -> Target:
    step = draw(st.sampled_from([1, 2]))
    full, unit = step * draw(st.integers(1, 200)), draw(st.integers(1, 500))
    return Target("qk", {"q": Matrix(full, unit, False)}, full, step, unit)


@st.composite
def matrices(draw: st.DrawFn) -> Target:
    rows, columns = draw(st.integers(2, 300)), draw(st.integers(2, 300))
    return Target("q", {"q": Matrix(rows, columns, False)}, min(rows, columns), 1, rows + columns)


@given(components(), KEEPS, KEEPS)
def test_component_sizes(target: Target, one: float, two: float) -> None:
    rule = ComponentRank()
    low, high = (rule.nearest(target, keep, {}) for keep in sorted((one, two)))
    for size in (low, high):
        assert rule.refusal(target, size, {}) is None
        assert 0 < rule.weights(target, size, {}) <= target.parameters
    assert low <= high
    legal = range(target.step, target.full + 1, target.step)
    within = [size for size in legal if size / target.full <= min(one, two)]
    assert low == max(within, default=target.step)


@given(matrices(), KEEPS, KEEPS)
def test_pair_sizes(target: Target, one: float, two: float) -> None:
    rule = PairRank()
    low, high = (rule.nearest(target, keep, {}) for keep in sorted((one, two)))
    for size in (low, high):
        assert rule.refusal(target, size, {}) is None
        assert 0 < rule.weights(target, size, {}) <= target.parameters
    assert low <= high
    budget = max(min(one, two) * target.parameters, target.unit)
    assert rule.weights(target, low, {}) <= budget < rule.weights(target, low + 1, {}) + 1e-6


@given(st.integers(1, 10**9), st.one_of(KEEPS, st.integers(1, 1000).map(lambda n: n / 1000)))
def test_the_most_of_a_whole_is_the_nearest_below(whole: int, keep: float) -> None:
    part = most(keep, whole)
    assert part / whole <= keep < (part + 1) / whole


def test_decimal_fractions_are_met_exactly() -> None:
    assert [most(n / 100, 100) for n in range(1, 101)] == [*range(1, 101)]
    assert (0.29 * 100, most(0.29, 100), most(1, 7)) == (28.999999999999996, 29, 7)


@given(matrices(), st.integers(-5, 400))
def test_a_pair_is_refused_exactly_where_it_is_empty_or_larger_than_the_matrix(
    target: Target, rank: int
) -> None:
    legal = rank >= 1 and rank * target.unit <= target.parameters
    assert (PairRank().refusal(target, rank, {}) is None) == legal


@given(components(), st.integers(-5, 500))
def test_a_component_is_refused_exactly_outside_its_steps(target: Target, rank: int) -> None:
    assert (ComponentRank().refusal(target, rank, {}) is None) == (
        rank in range(target.step, target.full + 1, target.step)
    )
