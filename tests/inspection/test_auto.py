"""``auto``: least error of one thing, ties by what is cheap, components against their projections in nats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lrc.checkpoint.reader import CheckpointReader
from lrc.inspection.auto import choose, choose_component
from lrc.methods import methods
from lrc.records.inspection import Choice, Estimate

BASE = Estimate(0.6, "svd", {}, 4, 60, 100, 0.3, "relative error", None, 2)


def test_the_least_error_is_taken_and_the_reason_has_both_figures() -> None:
    estimates = [BASE, replace(BASE, method="whitened_svd", error=0.2), replace(BASE, keep=0.4, error=0.01)]
    found = choose("q", 0.6, estimates, methods())
    assert found is not None
    assert (found.method, found.error, found.unit) == ("whitened_svd", 0.2, "relative error")
    assert found.reason == "0.2 relative error against 0.3 relative error by svd, the next best"
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
    assert ("fewer steps" in found.reason) == (taken == "svd")


def test_a_tie_of_equal_steps_goes_to_what_reads_less_of_the_text() -> None:
    found = choose("q", 0.6, [replace(BASE, method="whitened_svd"), BASE], methods())
    assert found is not None
    assert found.method == "svd"
    assert "less of the calibration text" in found.reason
    same = [replace(BASE, method=method, steps=2) for method in ("whitened_svd", "monarch")]
    found = choose("q", 0.6, same, methods())
    assert found is not None
    assert found.method == "monarch"
    assert "first by its name" in found.reason


def test_components_go_by_nats_or_by_the_default(tiny_checkpoint: Any) -> None:
    llama, gpt2 = (CheckpointReader(tiny_checkpoint(f)).architecture for f in ("llama", "gpt2"))

    def one(method: str, error: float, unit: Any = "nats of loss", kept: float = 0.6) -> Choice:
        return Choice(0.6, method, error, unit, "why", kept)

    parts = {"q": one("svd", 0.03), "k": one("whitened_svd", 0.02)}
    found = choose_component(llama, "qk", one("a3", 0.06), parts, methods())
    assert found.method == "q by svd, k by whitened_svd"
    assert found.error == pytest.approx(0.05)
    assert found.reason == "0.05 nats of loss one by one against 0.06 nats of loss as one by a3"
    for error, tied in ((0.04, False), (0.0503, True)):
        found = choose_component(llama, "qk", one("a3", error), parts, methods())
        assert (found.method, found.error) == ("a3", error)
        assert ("a tie" in found.reason) == tied
    parts = {role: one("svd", error, "relative error") for role, error in (("q", 0.3), ("k", 0.4))}
    whole = one("a3", 0.06, "nats KL")
    found = choose_component(llama, "qk", whole, parts, methods())
    assert (found.method, found.error, found.unit) == ("q and k by svd", 0.4, "relative error")
    assert "--gradients" in found.reason
    found = choose_component(gpt2, "qk", whole, parts, methods())
    assert (found.method, found.error, found.unit) == ("a3", 0.06, "nats KL")
    parts = {"q": one("svd", 0.3, kept=0.5), "k": one("svd", 0.2, kept=0.6)}
    found = choose_component(llama, "qk", one("a3", 0.1), parts, methods())
    assert found.kept == 0.6
    # 32 rows of queries and 16 of keys: (2 * 0.5 + 0.6) / 3
    assert found.reason.endswith("for q and k by svd; they keep 60.0% and 53.3%")
    found = choose_component(llama, "qk", one("a3", 0.9), parts, methods())
    assert found.kept == pytest.approx(1.6 / 3)
    assert found.reason.endswith("as one by a3; they keep 53.3% and 60.0%")


@pytest.mark.parametrize(("kept", "told"), [(59, "; they keep 60.0% and 59.0%"), (60, "")])
def test_kept_fractions_that_differ_are_told(kept: int, told: str) -> None:
    other = replace(BASE, method="whitened_svd", kept=kept, error=0.4)
    found = choose("q", 0.6, [BASE, other], methods())
    assert found is not None
    assert found.kept == 0.6
    assert (
        found.reason == f"0.3 relative error against 0.4 relative error by whitened_svd, the next best{told}"
    )
    tie = choose("q", 0.6, [BASE, replace(other, error=0.3)], methods())
    assert tie is not None
    assert tie.reason.endswith(f"it goes by less of the calibration text{told}")
