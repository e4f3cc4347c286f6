"""What an ablation says of a target is the perplexity of the model that a compression of it alone writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lrc
import lrc.verbs.ablate
from lrc.checkpoint.reader import CheckpointReader
from lrc.errors import UserError
from lrc.plan.schema import Calibration
from lrc.records.ablation import Ablated, Ablation

pytestmark = pytest.mark.usefixtures("without_pages")

TEXT = "".join(f"{n} bottles of beer on wall {n * 7919 % 1000}, take {n % 13} down. " for n in range(160))
SECTIONS = {"qk": "components", "ov": "components", "mlp": "components"}


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """A text to measure on and one to calibrate on."""
    paths = tmp_path / "text.txt", tmp_path / "calibration.txt"
    for path, text in zip(paths, (TEXT[:2000], TEXT[2000:]), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


@pytest.fixture
def ablate(texts, tmp_path):
    """Ablates a model on the texts, on four calibration blocks."""

    def run(model: Path, **options):
        given = {
            "ppl": str(texts[0]),
            "calib": str(texts[1]),
            "out": tmp_path,
            "seq_len": 48,
            "run": lrc.Run(device="cpu"),
        }
        return lrc.ablate(model, **(given | options))

    return run


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of a test hold no more than a few calibration blocks."""
    calibration = Calibration(samples=4, seq_len=48, first_token=5)
    monkeypatch.setattr("lrc.inspection.ablation.CALIBRATION", calibration)


def targets(found: Ablation) -> list[str]:
    return list(dict.fromkeys(result.target for result in found.results))


def at(found: Ablation, target: str, keep: float) -> Ablated:
    return next(r for r in found.results if (r.target, r.keep) == (target, keep))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_is_the_perplexity_of_the_saved_model(family, tiny_checkpoint, ablate, texts, tmp_path):
    source = tiny_checkpoint(family)
    found = ablate(source, keeps=[0.25, 0.5])
    assert found.keeps == [0.5, 0.25]
    assert targets(found) == list(CheckpointReader(source).architecture.targets)
    assert (
        found.dense.nats == lrc.evaluate(source, str(texts[0]), seq_len=48, run=lrc.Run(device="cpu"))[0].nats
    )
    for target, keep in (("qk", 0.5), ("ov", 0.25), ("mlp", 0.25), ("q", 0.5), ("o", 0.25)):
        result = at(found, target, keep)
        method = "a3" if target in SECTIONS else "whitened_svd"
        section = SECTIONS.get(target, "projections")
        asked: dict[str, Any] = {section: {target: {"method": method, "keep": keep}}}
        plan = lrc.Plan(refit="none", calibration=lrc.inspection.ablation.CALIBRATION, **asked)
        out = tmp_path / f"{target}-{keep}"
        report = lrc.compress(source, plan, out=out, calib=str(texts[1]), ppl=[], run=lrc.Run(device="cpu"))
        (saved,) = lrc.evaluate(out, str(texts[0]), seq_len=48, run=lrc.Run(device="cpu"))
        assert result.method == method
        assert result.perplexity == pytest.approx(saved.value, rel=1e-5), target
        assert result.increase == pytest.approx(saved.value / found.dense.value - 1, abs=1e-5)
        assert abs(result.increase) > 1e-4  # else this shows nothing
        records = [record for record in report.targets if record.target == target]
        kept = sum(r.kept for r in records) / sum(r.whole for r in records)
        assert result.kept == pytest.approx(kept)


def test_what_is_known_is_not_measured_again(tiny_checkpoint, ablate, monkeypatch):
    source, asked = tiny_checkpoint("llama"), []
    measured = lrc.inspection.ablation.losses

    def count(setting, *rest):
        asked.append(len(setting.plans))
        return measured(setting, *rest)

    monkeypatch.setattr(lrc.verbs.ablate, "losses", count)
    first = ablate(source, keeps=[0.5])
    assert (first.measured, asked) == (10, [3, 7])
    again = ablate(source, keeps=[0.5])
    assert again.measured == 0
    assert again.results == first.results
    more = ablate(source, keeps=[0.5, 0.25])
    assert (more.measured, asked) == (10, [3, 7, 3, 7])
    assert [at(more, r.target, 0.5) for r in first.results] == first.results
    assert ablate(source, keeps=[0.5], method="svd").measured == 7
    assert ablate(source, keeps=[0.5], fresh=True).results == first.results  # the same to the last digit
    assert asked[-2:] == [3, 7]
    other = ablate(source, keeps=[0.5], seq_len=32)
    assert other.file != first.file


def test_every_block_goes_through_every_layer_once(tiny_checkpoint, ablate, runs):
    """Those of the calibration for all plans together, windows of the text for every plan."""
    source = tiny_checkpoint("llama")
    dense = ablate(source, keeps=[0.5], method="svd").dense
    windows = dense.tokens // 47  # of 48 tokens, the first of which is not scored
    before = runs()
    assert before == {(0, False): 4 + 7 * windows, (1, False): 4 + 7 * windows}


def test_a_run_that_was_stopped_goes_on(tiny_checkpoint, ablate, monkeypatch):
    source = tiny_checkpoint("llama")
    measured, calls = lrc.inspection.ablation.losses, []

    def stop_at_the_second(*rest):
        calls.append(rest)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(*rest)

    monkeypatch.setattr(lrc.verbs.ablate, "losses", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        ablate(source, keeps=[0.5])
    monkeypatch.setattr(lrc.verbs.ablate, "losses", measured)
    found = ablate(source, keeps=[0.5])
    assert found.measured == 7
    assert found.results == ablate(source, keeps=[0.5], fresh=True).results


def test_another_file_is_not_overwritten(tiny_checkpoint, ablate):
    source = tiny_checkpoint("llama")
    file = Path(ablate(source, keeps=[0.5], method="svd").file)
    kept = json.loads(file.read_text(encoding="utf-8"))
    for text in ("not json", "[]", json.dumps(kept | {"key": {}}), json.dumps(kept | {"losses": [1]})):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"holds no results of lrc eval --ablate .* or pass --fresh"):
            ablate(source, keeps=[0.5], method="svd")
        assert file.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"keeps": [0.5, 1.0]}, "--keeps 0.5,1: fractions are distinct, above 0 and below 1"),
        ({"keeps": []}, "--keeps : fractions"),
        ({"keeps": [0.5, 0.5]}, "--keeps 0.5,0.5: fractions are distinct"),
        ({"method": "a4"}, "--method: unknown method 'a4'; did you mean 'a3'? known: a3, monarch"),
        ({"out": "nowhere"}, "nowhere is not a folder"),
        ({"seq_len": 65}, "--seq-len 65 is longer than the 64 positions of the model; use 64 or less"),
    ],
)
def test_mistakes(options, told, tiny_checkpoint, ablate, tmp_path):
    source = tiny_checkpoint("llama")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        ablate(source, **options)
    assert told in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_one_method_shrinks_what_it_can(tiny_checkpoint, ablate):
    source = tiny_checkpoint("llama")
    assert set(targets(ablate(source, keeps=[0.5], method="a3"))) == {"qk", "ov", "mlp"}
    assert set(targets(ablate(source, keeps=[0.5], method="svd"))) == {
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
    }


def test_a_fraction_that_no_size_has_takes_the_next_below(tiny_checkpoint, ablate):
    found = ablate(tiny_checkpoint("llama"), keeps=[0.99], method="a3")
    assert at(found, "qk", 0.99).kept == 0.75  # four rotary pairs, of which none is a hundredth


@pytest.mark.parametrize(("batch_size", "told"), [(2, "try --batch-size below 2, a"), (1, "try a")])
def test_a_full_gpu_is_told_with_what_the_verb_takes(batch_size, told, tiny_checkpoint, ablate, monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lrc.verbs.ablate.losses", full)
    with pytest.raises(UserError) as error:
        ablate(
            tiny_checkpoint("llama"),
            keeps=[0.5],
            method="svd",
            run=lrc.Run(device="cpu", batch_size=batch_size),
        )
    assert f"{told} shorter --seq-len, or --device cpu (CUDA out of memory)" in str(error.value)
