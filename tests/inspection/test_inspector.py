"""The whole inspection: estimates are the methods' own, layers and targets as asked, and the same every time."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lrc.checkpoint.reader import CheckpointReader
from lrc.errors import UserError
from lrc.inspection.output import Output
from lrc.methods import methods
from lrc.records.compression import json_text
from lrc.records.inspection import Inspection
from lrc.run.settings import Run

CPU = torch.device("cpu")


def test_estimates_are_what_a_compression_would_predict(
    tiny_checkpoint: Any, inspected: Any, find: Any, output: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrc.plan.resolve.TOKENS_PER_FIRST", 4)  # so that first tokens count as 8 in both
    folder = tiny_checkpoint("llama")
    found = inspected(folder, keeps=[0.5], gradients=True)
    for plan, method in (
        ("method: a3\ncomponents: {qk: {}}", "a3"),
        ("method: two_sided_svd", "two_sided_svd"),
    ):
        out = output(folder, f"keep: 0.5\nrefit: none\n{plan}", method)
        for record in json.loads((out / "lrc.json").read_text(encoding="utf-8"))["targets"]:
            one = find(found, record["layer"], record["target"])
            (estimate,) = (e for e in one.estimates if e.method == method)
            assert (estimate.size, estimate.options) == (record["size"], record["options"])
            predicted = record["predicted"]
            if predicted["loss"] is not None:  # of qk there is one where its metric reads gradients
                assert estimate.loss == pytest.approx(predicted["loss"], rel=1e-6)
            assert estimate.loss is not None
            if predicted["metric"] == "output":
                expected = (predicted["error"] / predicted["reference"]) ** 0.5
                assert estimate.error == pytest.approx(expected, rel=1e-6)
            else:
                assert (estimate.error, estimate.unit) == (pytest.approx(predicted["error"]), "nats KL")


def test_whitened_svd_loses_the_tail_of_the_whitened_spectrum(
    tiny_checkpoint: Any, inspected: Any, find: Any
) -> None:
    found = inspected(tiny_checkpoint("llama"), targets=["o", "up"], methods=["svd", "whitened_svd"])
    for role in ("o", "up"):
        one = find(found, 0, role)
        energy = dict(zip(one.whitened.ranks, one.whitened.energy, strict=True))
        checked = 0
        for estimate in one.estimates:
            if estimate.method == "whitened_svd" and estimate.size in energy:
                assert estimate.error**2 == pytest.approx(1 - energy[estimate.size], rel=1e-3)
                checked += 1
        assert checked >= 3


def test_every_choice_is_of_the_least_error(tiny_checkpoint: Any, inspected: Any) -> None:
    found = inspected(tiny_checkpoint("gpt2"), gradients=True)
    assert found.gradients
    for one in found.targets:
        assert [choice.keep for choice in one.choices] == sorted(
            {e.keep for e in one.estimates}, reverse=True
        )
        for choice in one.choices:
            losses = [e.loss for e in one.estimates if e.keep == choice.keep]
            assert choice.unit == "nats of loss"
            assert choice.error <= min(loss for loss in losses if loss is not None) * 1.01


def test_layers_and_targets_as_asked_and_the_same_figures(
    tiny_checkpoint: Any, inspected: Any, find: Any
) -> None:
    folder = tiny_checkpoint("llama", num_hidden_layers=3)
    whole = inspected(folder)
    names = ("qk", "ov", "mlp", "q", "k", "v", "o", "gate", "up", "down")
    assert [(t.layer, t.target) for t in whole.targets] == [(i, name) for i in range(3) for name in names]
    some = inspected(folder, layers="1,-1", targets=["up", "ov"], methods=["whitened_svd", "a3"])
    assert some.layers == [1, 2]
    assert [(t.layer, t.target) for t in some.targets] == [(1, "ov"), (1, "up"), (2, "ov"), (2, "up")]
    assert {(m.layer, m.site) for m in some.moments} == {(i, s) for i in (1, 2) for s in ("o_in", "mlp_in")}
    for one in some.targets:
        same = find(whole, one.layer, one.target)
        assert (one.plain, one.whitened) == (same.plain, same.whitened)
        asked = [e for e in same.estimates if e.method in ("whitened_svd", "a3")]
        assert [asdict(e) for e in one.estimates] == [asdict(e) for e in asked]
    assert inspected(folder).targets == whole.targets


def test_waiting_on_disk_and_batches_change_nothing_that_counts(tiny_checkpoint: Any, inspected: Any) -> None:
    folder = tiny_checkpoint("gpt2")
    one, other = inspected(folder), inspected(folder, run=Run(device="cpu", batch_size=2, offload="disk"))
    assert one.targets == other.targets
    by_four = inspected(folder, run=Run(device="cpu", batch_size=4))
    for a, b in zip(one.targets, by_four.targets, strict=True):
        assert a.whitened.effective_rank == pytest.approx(b.whitened.effective_rank, rel=1e-4)


def test_the_record_is_json_with_a_version(tiny_checkpoint: Any, inspected: Any) -> None:
    folder = tiny_checkpoint("gpt2")
    found: Inspection = inspected(folder, targets=["q"], keeps=[0.5])
    read = json.loads(json_text(asdict(found)))
    assert read["version"] == 3
    assert read["fingerprint"] == CheckpointReader(folder).fingerprint
    assert read["targets"][0]["estimates"][0]["keep"] == 0.5
    assert set(read) == set(asdict(found))
    assert {e["method"] for e in read["targets"][0]["estimates"]} <= set(methods())
    assert read["warnings"] == []


def test_few_tokens_are_told_by_the_widest_moment_that_is_taken(tiny_checkpoint: Any, inspected: Any) -> None:
    folder = tiny_checkpoint("gpt2")

    def told(tokens: int, **options: Any) -> list[str]:
        return inspected(folder, samples=1, seq_len=tokens, keeps=[0.5], **options).warnings

    narrow = ["calibration has 16 tokens for moments of 32 dimensions; use more samples"]
    wide = ["calibration has 32 tokens for moments of 128 dimensions; use more samples"]
    assert told(16, targets=["q"]) == told(16, targets=["embed"]) == narrow
    assert told(32, targets=["q", "embed"]) == told(32, targets=["embed"], gradients=True) == []
    assert told(32, targets=["fc_out"], methods=["svd"]) == wide  # its spectrum is whitened all the same
    assert told(32, targets=["fc_out"], gradients=True) == wide
    assert told(16, targets=["ov"], gradients=True) == [
        *narrow,
        "gradients are of 16 tokens for moments of 32 dimensions; use more samples",
    ]


def test_an_output_of_something_else_is_refused(
    tiny_checkpoint: Any, inspected: Any, output: Any, tmp_path: Path
) -> None:
    folder, other = tiny_checkpoint("llama"), tiny_checkpoint("llama", seed=1)
    out = output(folder, "keep: 0.5\nmethod: svd\nrefit: none")
    with pytest.raises(UserError, match=r"was made of .* name the model that it was made of"):
        inspected(other, against=out)
    with pytest.raises(UserError, match=r"is no lrc output: it has no lrc\.json"):
        inspected(folder, against=folder)
    manifest = out / "lrc.json"
    read = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps({**read, "targets": [{}]}), encoding="utf-8")
    with pytest.raises(UserError, match=r"lrc\.json is damaged"):
        Output(out, CheckpointReader(folder), "it", CPU)
    manifest.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"lrc\.json is damaged"):
        Output(out, CheckpointReader(folder), "it", CPU)


@pytest.mark.parametrize("asked", ["all", "gradients", "against", "last layer", "outside"])
def test_every_block_goes_through_every_layer_once(
    tiny_checkpoint: Any, inspected: Any, output: Any, runs: Any, asked: str
) -> None:
    """Beside an output too; the gradients take one sweep there and one back."""
    folder = tiny_checkpoint("llama")
    options: dict[str, dict[str, Any]] = {
        "all": {},
        "gradients": {"gradients": True},
        "against": {},
        "last layer": {"layers": "-1"},
        "outside": {"targets": ["embed"]},
    }
    if asked == "against":
        options[asked]["against"] = output(folder, "keep: 0.5\nmethod: a3")
    runs()
    inspected(folder, keeps=[0.5], **options[asked])
    swept = {(0, False): 8, (0, True): 4, (1, False): 8, (1, True): 4}
    assert runs() == (swept if asked == "gradients" else {(0, False): 4, (1, False): 4})
