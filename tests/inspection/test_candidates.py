"""What is tried: every method that solves a target, at sizes that save something, with what is collected."""

from __future__ import annotations

from typing import Any

from lrc.checkpoint.reader import CheckpointReader
from lrc.inspection.candidates import able_options, candidates
from lrc.methods import methods
from lrc.moments import collectors

WITHOUT = collectors() - {"gradients"}


def by_target(folder: Any, collectors: Any, keeps: Any = (0.6,)) -> dict[str, dict[str, Any]]:
    architecture = CheckpointReader(folder).architecture
    found = candidates(architecture, architecture.targets.values(), methods(), keeps, collectors)
    return {
        target: {c.assignment.method: c.assignment for c in each if c.keep == keeps[0]}
        for target, each in found.items()
    }


def test_components_and_projections_have_methods_of_their_own(tiny_checkpoint: Any) -> None:
    found = by_target(tiny_checkpoint("llama"), collectors())
    solved = {name: method.solvers.keys() for name, method in methods().items()}
    for target in ("qk", "ov", "mlp"):
        assert set(found[target]) == {name for name, targets in solved.items() if target in targets}
    for target in ("q", "k", "v", "o", "gate", "up", "down"):
        assert set(found[target]) == {name for name, targets in solved.items() if "projection" in targets}
    assert all(a.kept < a.whole for each in found.values() for a in each.values())


def test_without_gradients_options_go_without_or_the_method_does(tiny_checkpoint: Any) -> None:
    found = by_target(tiny_checkpoint("gpt2"), WITHOUT)
    assert "two_sided_svd" not in found["q"]
    assert found["mlp"]["a3"].options["metric"] == "output"
    assert found["qk"]["a3"].options["metric"] == "attention"
    assert by_target(tiny_checkpoint("gpt2"), collectors())["mlp"]["a3"].options["metric"] == "loss"
    assert able_options(methods()["a3"].solvers["qk"], {"moments"}) == {"metric": "score"}


def test_sizes_that_are_not_legal_or_save_nothing_are_left_out(tiny_checkpoint: Any) -> None:
    folder = tiny_checkpoint("llama", intermediate_size=50)  # which 4 blocks do not divide
    found = by_target(folder, collectors())
    assert "monarch" not in found["down"]
    assert "monarch" in found["q"]
    tight = by_target(folder, collectors(), (0.99,))
    assert tight["qk"]  # with 6 of 8 dimensions: never more than asked
