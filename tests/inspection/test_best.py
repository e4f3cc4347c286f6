"""The best method: least error of one target, ties by cost, components against their projections in nats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lrc.checkpoint.reader import CheckpointReader
from lrc.inspection.best import choose, choose_component
from lrc.methods import methods
from lrc.records.inspection import Choice, Estimate

BASE = Estimate(0.6, "svd", {}, 4, 60, 100, 0.3, "relative error", None, 2)


def test_the_least_error_is_taken_and_the_next_best_stands_beside_it() -> None:
    estimates = [BASE, replace(BASE, method="whitened_svd", error=0.2), replace(BASE, keep=0.4, error=0.01)]
    found = choose("q", 0.6, estimates, methods())
    assert found is not None
    assert (found.method, found.error, found.unit) == ("whitened_svd", 0.2, "relative error")
    assert (found.next_method, found.next_error, found.next_kept) == ("svd", 0.3, 0.6)
    assert choose("q", 0.5, estimates, methods()) is None
    other = replace(BASE, method="monarch", error=1e-3, unit="nats KL")  # of another thing
    assert choose("q", 0.6, [*estimates, other], methods()) == found


def test_the_loss_counts_where_all_have_it() -> None:
    estimates = [replace(BASE, loss=0.01), replace(BASE, method="whitened_svd", error=0.2, loss=0.02)]
    found = choose("q", 0.6, estimates, methods())
    assert found is not None
    assert (found.method, found.error, found.unit) == ("svd", 0.01, "nats of loss")
    partly = choose("q", 0.6, [*estimates[:1], replace(estimates[1], loss=None)], methods())
    assert partly is not None
    assert (partly.method, partly.unit) == ("whitened_svd", "relative error")


@pytest.mark.parametrize(("error", "taken"), [(0.2019, "svd"), (0.2021, "monarch")])
def test_a_tie_goes_to_fewer_steps(error: float, taken: str) -> None:
    monarch = replace(BASE, method="monarch", error=0.2, steps=3)
    found = choose("q", 0.6, [monarch, replace(BASE, error=error)], methods())
    assert found is not None
    assert found.method == taken
    assert {found.method, found.next_method} == {"svd", "monarch"}


def test_a_tie_of_equal_steps_goes_to_what_reads_less_of_the_text() -> None:
    found = choose("q", 0.6, [replace(BASE, method="whitened_svd"), BASE], methods())
    assert found is not None
    assert found.method == "svd"
    same = [replace(BASE, method=method, steps=2) for method in ("whitened_svd", "monarch")]
    found = choose("q", 0.6, same, methods())
    assert found is not None
    assert found.method == "monarch"


def test_components_go_by_nats_or_by_the_default(tiny_checkpoint: Any) -> None:
    llama, gpt2 = (CheckpointReader(tiny_checkpoint(f)).architecture for f in ("llama", "gpt2"))

    def one(method: str, error: float, unit: Any = "nats of loss", kept: float = 0.6) -> Choice:
        return Choice(0.6, method, error, unit, kept)

    parts = {"q": one("svd", 0.03), "k": one("whitened_svd", 0.02)}
    found = choose_component(llama, "qk", one("a3", 0.06), parts, methods())
    assert found.method == "q by svd, k by whitened_svd"
    assert found.error == pytest.approx(0.05)
    assert (found.next_method, found.next_error) == ("a3", 0.06)
    for error in (0.04, 0.0503):  # the second within a tie
        found = choose_component(llama, "qk", one("a3", error), parts, methods())
        assert (found.method, found.error) == ("a3", error)
        assert (found.next_method, found.next_error) == ("q by svd, k by whitened_svd", 0.05)
    parts = {role: one("svd", error, "relative error") for role, error in (("q", 0.3), ("k", 0.4))}
    whole = one("a3", 0.06, "nats KL")
    found = choose_component(llama, "qk", whole, parts, methods())
    assert (found.method, found.error, found.unit) == ("q and k by svd", 0.4, "relative error")
    assert found.next_method is None  # errors of the component and of its projections are of other things
    found = choose_component(gpt2, "qk", whole, parts, methods())
    assert (found.method, found.error, found.unit) == ("a3", 0.06, "nats KL")
    parts = {"q": one("svd", 0.3, kept=0.5), "k": one("svd", 0.2, kept=0.6)}
    found = choose_component(llama, "qk", one("a3", 0.1), parts, methods())
    assert found.kept == 0.6
    # 32 rows of queries and 16 of keys: (2 * 0.5 + 0.6) / 3
    assert found.next_kept == pytest.approx(1.6 / 3)
    found = choose_component(llama, "qk", one("a3", 0.9), parts, methods())
    assert found.kept == pytest.approx(1.6 / 3)
    assert found.next_kept == 0.6
