from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc.allocation.spend import Curve, allocate, not_rising


def options(curve: Curve) -> list[tuple[int, int, float]]:
    """Every legal size with its weights and its nats, written down from what the contract says of them."""
    sizes = [
        n
        for n in range(max(curve.sizes[0], curve.floor), curve.full)
        if n % curve.step == 0 and n * curve.unit < curve.whole and (curve.cap is None or n <= curve.cap)
    ]
    points = [*(n * curve.unit for n in curve.sizes), curve.full * curve.unit]
    roots = [value**0.5 for value in (*falling(curve.costs), 0.0)]
    found = []
    for size in sizes:
        x = size * curve.unit
        right = next(i for i in range(1, len(points)) if points[i] >= x)
        share = (x - points[right - 1]) / (points[right] - points[right - 1])
        found.append((size, x, ((1 - share) * roots[right - 1] + share * roots[right]) ** 2))
    return found if curve.cap is not None else [*found, (curve.full, curve.whole, 0.0)]


def falling(values: tuple[float, ...]) -> list[float]:
    """Least squares under a falling order by its min-max formula, and not below 0."""
    ends = range(len(values))
    means = {(a, b): sum(values[a : b + 1]) / (b + 1 - a) for a in ends for b in ends if a <= b}
    return [max(min(max(means[a, b] for b in ends if b >= i) for a in ends if a <= i), 0.0) for i in ends]


def cheapest(curves: list[Curve], budget: int) -> float:
    """Least nats of all combinations within a budget."""
    combinations = itertools.product(*(options(curve) for curve in curves))
    return min(sum(n for *_, n in c) for c in combinations if sum(w for _, w, _ in c) <= budget)


def quadratic(layer: int, scale: float, full: int = 6, unit: int = 4, step: int = 1) -> Curve:
    """Costs that grow with the square of what is lost."""
    sizes = tuple(range(step, full, step))
    nats = tuple(scale * (full - n) ** 2 for n in sizes)
    return Curve(layer, "mlp", sizes, nats, full, unit, full * unit, step)


@st.composite
def any_curve(draw: st.DrawFn) -> Curve:
    full, unit = draw(st.integers(3, 9)), draw(st.integers(1, 7))
    sizes = tuple(sorted(draw(st.sets(st.integers(1, full - 1), min_size=1, max_size=4))))
    nats = tuple(draw(st.floats(-0.5, 3)) for _ in sizes)
    step = draw(st.sampled_from([1, 1, 2]))
    # A pair may reach the weights of its matrix before full rank, but it was measured below them.
    whole = draw(st.integers(sizes[-1] * unit + 1, full * unit))
    curve = Curve(0, "mlp", sizes, nats, full, unit, whole, step, draw(st.integers(0, full - 1)))
    capped = replace(curve, cap=draw(st.integers(curve.floor, full - 1)))
    return draw(st.sampled_from([curve, capped])) if options(capped) else curve


curve_lists = st.lists(any_curve(), min_size=1, max_size=3)


@given(st.lists(st.floats(-1, 3), min_size=1, max_size=7))
def test_clean_up_is_least_squares_under_a_falling_order(values):
    cleaned = not_rising(values)
    assert cleaned == pytest.approx(falling(tuple(values)), abs=1e-12)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(cleaned))


def test_clean_up_averages_noise_and_leaves_the_rest():
    assert not_rising([0.5, 0.25, 0.125]) == [0.5, 0.25, 0.125]
    assert not_rising([0.5, 0.1, 0.3, -0.1]) == pytest.approx([0.5, 0.2, 0.2, 0.0])


@pytest.mark.parametrize("budget", range(12, 73, 4))
def test_is_optimal_where_costs_are_convex(budget):
    curves = [quadratic(0, 1.0), quadratic(1, 0.3), quadratic(2, 0.05)]
    found = allocate(curves, budget)
    assert found.cost == pytest.approx(cheapest(curves, budget), abs=1e-9)
    assert found.weights == budget


@settings(deadline=None)
@given(curve_lists, st.floats(0, 1))
def test_is_within_one_jump_of_the_best(curves, share):
    """What a hollow stretch makes it miss is at most the largest jump's worth of weights."""
    least, whole = (sum(sum(o[end][1] for o in [options(c)]) for c in curves) for end in (0, -1))
    budget = least + int(share * (whole - least))
    found = allocate(curves, budget)
    jump = max(options(c)[-1][1] - options(c)[0][1] for c in curves)
    assert cheapest(curves, budget) <= found.cost + 1e-9
    if budget - jump >= least:
        assert found.cost <= cheapest(curves, budget - jump) + 1e-9


@settings(deadline=None)
@given(curve_lists, st.floats(0, 1))
def test_keeps_the_budget_and_leaves_nothing_that_fits(curves, share):
    least, whole = (sum(options(c)[end][1] for c in curves) for end in (0, -1))
    assert least == sum(curve.smallest for curve in curves)
    budget = least + int(share * (whole - least))
    found = allocate(curves, budget)
    chosen = []
    for curve, size in zip(curves, found.sizes, strict=True):
        (at,) = [i for i, o in enumerate(options(curve)) if o[0] == size]  # a legal size
        chosen.append((curve, at))
    assert found.weights == sum(options(c)[at][1] for c, at in chosen) <= budget
    assert found.cost == pytest.approx(sum(options(c)[at][2] for c, at in chosen), abs=1e-9)
    left = budget - found.weights
    for curve, at in chosen:
        larger = options(curve)[at + 1 :]
        assert not larger or larger[0][1] - options(curve)[at][1] > left


def test_the_whole_budget_keeps_everything_and_the_least_the_smallest_sizes():
    curves = [quadratic(0, 1.0), quadratic(1, 0.3)]
    assert allocate(curves, 48).sizes == (6, 6)
    assert allocate(curves, 10**9).cost == 0
    assert allocate(curves, 8).sizes == (1, 1)
    with pytest.raises(AssertionError, match="below the smallest"):
        allocate(curves, 7)


def test_the_fine_grained_take_up_what_coarse_steps_leave():
    coarse = [replace(quadratic(i, 1.0, full=32, unit=100), step=8) for i in range(3)]
    fine = quadratic(3, 1e-6, full=2000, unit=1)
    found = allocate([*coarse, fine], 7654)
    assert found.weights == 7654
    assert all(size % 8 == 0 for size in found.sizes[:3])


def test_a_jump_over_a_hollow_stretch_is_seen():
    """Nothing is saved until all of the second is kept; looking one step ahead would never go there."""
    flat = Curve(0, "mlp", (1, 2, 3), (5.0, 5.0, 5.0), 4, 10, 40)
    steady = quadratic(1, 0.01, full=4, unit=10)
    assert allocate([steady, flat], 50).sizes == (1, 4)


def test_a_large_model_is_allocated_in_seconds():
    draw = random.Random(0)
    curves = []
    for layer, (target, full, unit) in itertools.product(
        range(32), [("qk", 128, 8192), ("ov", 128, 8192), ("mlp", 11008, 12288)]
    ):
        sizes = tuple(int(full * f) for f in (0.3, 0.45, 0.6, 0.75, 0.9))
        nats = tuple(draw.uniform(0.1, 1) * (1 - n / full) ** 2 for n in sizes)
        curves.append(Curve(layer, target, sizes, nats, full, unit, full * unit))
    whole = sum(curve.whole for curve in curves)
    for keep in (0.9, 0.7, 0.5):
        start = time.perf_counter()
        found = allocate(curves, int(keep * whole))
        assert time.perf_counter() - start < 5
        assert 0.9999 * keep < found.weights / whole <= keep
