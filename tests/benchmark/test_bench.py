"""A benchmark from folders to figures, and what is refused before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import lrc
from lrc.benchmark import needs
from lrc.benchmark.cases import Case
from lrc.benchmark.measure import Timing
from lrc.benchmark.needs import fit_together, needs_of
from lrc.errors import UserError
from lrc.modules import attention
from lrc.records.benchmark import Bench, Model, Row
from lrc.verbs import bench as benching

TinyCheckpoint = Callable[..., Path]
QUICK: dict[str, Any] = {"new_tokens": 2, "repeats": 2, "run": lrc.Run(device="cpu")}
SHAPES: dict[str, Any] = {"prefill": [(2, 8)], "decode": [(2, 8)]}
CPU = torch.device("cpu")


@pytest.fixture
def pair(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> tuple[Path, Path]:
    """A compressed model and its original."""
    original, plan, text = tiny_checkpoint("llama"), tmp_path / "plan.yaml", tmp_path / "text.txt"
    plan.write_text("format: 1\nkeep: 0.5\nmethod: a3\ncalibration: {samples: 4}\n", encoding="utf-8")
    text.write_text(
        "It was a bright cold day in April, and the clocks were striking. " * 20, encoding="utf-8"
    )
    lrc.compress(original, plan, calib=str(text), out=tmp_path / "small", ppl=[], run=lrc.Run(device="cpu"))
    return tmp_path / "small", original


def test_a_model_beside_its_original(pair: tuple[Path, Path]) -> None:
    found = lrc.bench(*pair, **SHAPES, **QUICK)
    assert (found.device, found.dtype, found.interleaved) == ("cpu", "float32", True)
    assert found.against is not None
    assert (found.of.merged, found.against.merged) == (4, 0)
    for side, folder in zip((found.of, found.against), pair, strict=True):
        with safe_open(folder / "model.safetensors", "pt") as stored:
            floats = sum(stored.get_tensor(name).nbytes for name in stored.keys())  # noqa: SIM118
        assert 0 <= side.weight_bytes - floats < 100  # and the rotary frequencies, which are not stored
    for row, phase in zip(found.rows, ("prefill", "decode"), strict=True):
        assert row.case == Case(phase, *SHAPES[phase][0], "eager")  # type: ignore[arg-type]
        assert row.theirs is not None
        assert row.speedup == row.ours.tokens_per_second / row.theirs.tokens_per_second
        assert row.speedup is not None
        assert row.expected is not None
        assert row.expected > 1
        assert row.reached == row.speedup / row.expected
        assert row.ours.kv_bytes < row.theirs.kv_bytes
    document = json.loads(json.dumps(found.as_dict()))
    assert document["version"] == 1
    assert [row["expected_of"] for row in document["rows"]] == ["operations", "bytes"]
    assert document["rows"][0]["ours"]["tokens_per_second"] == found.rows[0].ours.tokens_per_second
    assert document["rows"][0]["ours"]["spread"] is None  # of two samples


def test_a_model_alone(tiny_checkpoint: TinyCheckpoint) -> None:
    found = lrc.bench(tiny_checkpoint("gpt2"), **SHAPES, **QUICK)
    assert (found.against, found.warnings) == (None, [])
    assert [(row.speedup, row.expected, row.reached) for row in found.rows] == [(None, None, None)] * 2


def test_one_that_is_slower_with_no_more_weights_is_told(pair: tuple[Path, Path]) -> None:
    found = lrc.bench(*pair, **SHAPES, **QUICK)
    theirs = found.rows[1].theirs
    assert theirs is not None
    theirs = replace(theirs, samples=10, seconds=1.0, low_seconds=0.9, high_seconds=1.1)
    slow = replace(
        found.rows[1], theirs=theirs, ours=replace(theirs, seconds=2.0, low_seconds=1.9, high_seconds=2.2)
    )
    fast = replace(found.rows[0], ours=replace(theirs, seconds=theirs.seconds / 2), theirs=theirs)
    (warning,) = replace(found, rows=[fast, slow]).warnings
    assert warning.startswith(
        f"decode 2x8 eager: {pair[0]} is slower than {pair[1]}, 0.500 of its tokens per second"
    )
    assert found.against is not None
    larger = replace(found, of=replace(found.of, weight_bytes=found.against.weight_bytes + 1), rows=[slow])
    assert larger.warnings == []


@pytest.mark.parametrize(
    ("ours", "theirs", "slower"),
    [
        ((1.0, 0.99, 1.01, 10), (0.9, 0.89, 0.91, 10), True),
        ((0.9, 0.89, 0.91, 10), (1.0, 0.99, 1.01, 10), False),
        ((1.0, 0.9, 1.1, 10), (0.9, 0.8, 1.0, 10), False),  # apart by less than the quartiles are
        ((1 / 115, 0.83 / 115, 1.17 / 115, 10), (1 / 307, 0.2 / 307, 2.26 / 307, 10), False),  # 307 ± 103 %
        ((1.0, 0.99, 1.01, 3), (0.985, 0.98, 0.99, 3), False),  # of three samples
        ((1.0, 0.99, 1.01, 30), (0.975, 0.97, 0.98, 30), True),
        ((2.0, None, None, 2), (1.0, None, None, 2), False),
    ],
)
def test_slower_is_said_only_if_the_samples_support_it(ours: Any, theirs: Any, slower: bool) -> None:
    sides = [
        Timing(16, samples, seconds, low, high, 1, 1, 1, None)
        for seconds, low, high, samples in (ours, theirs)
    ]
    row = Row(Case("decode", 1, 8, "eager"), *sides)
    models = [Model(name, 1, 0) for name in ("a", "b")]
    found = Bench(models[0], models[1], [row], "cpu", "float32", 16, True, {})
    assert any("slower" in warning for warning in found.warnings) == slower == row.slower


def test_models_that_fit_one_at_a_time_are_measured_so(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = [needs_of("", folder, torch.float32, CPU, trusted=False) for folder in pair]
    cases = [Case("prefill", 2, 8, "eager"), Case("decode", 2, 8, "eager")]
    largest = max(side.weights + side.beside(case) for side in sides for case in cases)
    monkeypatch.setattr(needs, "free_bytes", lambda device: int(largest / 0.9) + 2)
    loaded: list[Path] = []
    load = benching.load
    monkeypatch.setattr(
        benching, "load", lambda folder, **given: loaded.append(folder) or load(folder, **given)
    )
    found = lrc.bench(*pair, **SHAPES, **QUICK)
    assert loaded == list(pair)
    assert not found.interleaved
    assert "one was measured after the other" in found.warnings[-1]
    assert found.against is not None
    assert found.of.weight_bytes < found.against.weight_bytes
    assert all(row.ours.kv_bytes < row.theirs.kv_bytes for row in found.rows if row.theirs)


def test_a_device_that_is_too_small(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    side = needs_of("it", pair[1], torch.float32, CPU, trusted=False)
    case = Case("decode", 64, 32, "eager")
    monkeypatch.setattr(benching, "load", None)  # nothing is

    def refused(free: int, case: Case = case) -> str:
        monkeypatch.setattr(needs, "free_bytes", lambda device: free)
        with pytest.raises(UserError) as caught:
            lrc.bench(pair[1], prefill=[], decode=[(case.batch, case.length)], **QUICK)
        return str(caught.value)

    needed = side.weights + side.beside(case)
    message = refused(needed - 1)
    assert f"needs about {needed:,} bytes on cpu for decode 64x32 ({side.weights:,} of weights" in message
    assert f"{needed - 1:,} are free" in message
    (batch,) = (
        int(word.split("x")[0]) for word in message.split() if word.endswith("x32") and word != "64x32"
    )
    assert (
        side.weights + side.beside(replace(case, batch=batch))
        <= 0.9 * (needed - 1)
        < side.weights + side.beside(replace(case, batch=batch + 1))
    )
    assert "not even --decode 1x32 fits" in refused(int(side.weights / 0.9) + 10)
    assert "the weights alone do not fit" in refused(side.weights)
    monkeypatch.setattr(needs, "free_bytes", lambda device: int(needed / 0.9) + 2)
    assert fit_together([side], [case], CPU)


def test_pickled_weights_are_to_be_converted(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        lrc.bench(folder, **SHAPES, **QUICK)
    assert f"{folder} has no safetensors weights" in str(caught.value)
    assert "--allow-pickle" not in str(caught.value)  # which lrc bench does not have


def test_needs_are_of_what_is_stored(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = lrc.bench(*pair, **SHAPES, **QUICK)
    for side, folder in zip(("ours", "theirs"), pair, strict=True):
        stated = needs_of("", folder, torch.float32, CPU, trusted=False)
        assert stated.kv == getattr(found.rows[1], side).kv_bytes_per_token
        assert needs_of("", folder, torch.bfloat16, CPU, trusted=False).kv == stated.kv // 2
    monkeypatch.setitem(attention.STEP, "cpu", 8)
    assert (
        needs_of("", pair[0], torch.float32, CPU, trusted=False).kv
        == needs_of("", pair[1], torch.float32, CPU, trusted=False).kv
    )  # heads of 8 and of 4
