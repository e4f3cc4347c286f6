"""The order that the methods exist for, on the built-in models: what knows more of the model loses less of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import lrc

pytestmark = pytest.mark.usefixtures("without_pages", "tokenized_once")

KEEP = 0.6
PUBLISHED = {
    "qk": {"metric": "score"},
    "ov": {"metric": "output", "subspace": "stacked", "refit": "none"},
    "mlp": {"metric": "output", "select": "score"},
}
# From the best to the worst; all but the first without the residual refit, which none of the papers has.
PLANS = {
    "loss-aware": {"method": "a3"},
    "loss-aware, not refitted": {"method": "a3", "refit": "none"},
    "published": {"method": "a3", "components": PUBLISHED, "refit": "none"},
    "whitened": {"method": "whitened_svd", "refit": "none"},
    "plain": {"method": "svd", "refit": "none"},
}


@pytest.mark.parametrize("model", ["tiny-gpt2", "tiny-llama"])
def test_loss_aware_beats_published_beats_whitened_beats_plain(model: str, tmp_path: Path) -> None:
    found = {}
    for name, plan in PLANS.items():
        calibration = {"samples": 8, "seq_len": 256}
        text = yaml.safe_dump({"format": 1, "keep": KEEP, **plan, "calibration": calibration})
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        report = lrc.compress(
            model, tmp_path / f"{name}.yaml", out=tmp_path / name, ppl=[], run=lrc.Run(device="cpu")
        )
        assert report.keep == pytest.approx(KEEP, abs=0.01)
        (after,) = lrc.evaluate(tmp_path / name, "builtin", max_windows=4, run=lrc.Run(device="cpu"))
        found[name] = after.value
    assert list(found.values()) == sorted(found.values()), found
