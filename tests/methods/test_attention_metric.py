"""What the attention metric is for: less divergence of attention at the same size, on real weights."""

from __future__ import annotations

from pathlib import Path

import pytest

import lrc

pytestmark = pytest.mark.usefixtures("without_pages")

RANKS = {"tiny-llama": 8, "tiny-gpt2": 12}


def divergences(folder: Path, model: str, metric: str) -> list[float]:
    """Measured KL of every layer with its queries and keys at a rank, all else whole."""
    rank, plan = RANKS[model], folder / f"{metric}.yaml"
    plan.write_text(
        f"format: 1\ncomponents: {{qk: {{rank: {rank}, metric: {metric}}}}}\nrefit: none\n"
        "calibration: {samples: 6, seq_len: 256}\n",
        encoding="utf-8",
    )
    report = lrc.compress(model, plan, out=folder / plan.stem, ppl=[], run=lrc.Run(device="cpu"))
    return [target.measured.kl for target in report.targets if target.measured.kl is not None]


@pytest.mark.parametrize("model", RANKS)
def test_attention_beats_score_in_the_divergence_measured(tmp_path, model):
    score, attention = (divergences(tmp_path, model, metric) for metric in ("score", "attention"))
    assert sum(attention) < 0.97 * sum(score)
