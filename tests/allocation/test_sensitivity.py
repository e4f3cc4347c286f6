"""A point of a curve is the divergence of the very model that a compression with nothing else shrunk writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lrc
from lrc.allocation import ALLOCATORS
from lrc.allocation.contract import Advance, Setting
from lrc.allocation.sensitivity import Sensitivity, passes
from lrc.allocation.spend import Curve
from lrc.calibration.draw import Texts
from lrc.checkpoint.reader import CheckpointReader
from lrc.errors import UserError
from lrc.evaluation.perplexity import window_losses
from lrc.methods import methods
from lrc.moments import collectors
from lrc.plan.resolve import parse_plan, resolve
from lrc.plan.resolved import ResolvedPlan
from lrc.text.blocks import calibration_blocks, tokenize
from lrc.text.corpus import Drawn, Source

CALIBRATION = "calibration: {samples: 4, seq_len: 32, first_token: 5}"
TEXT = "".join(f"{n} bottles of beer on wall {n * 7919 % 1000}, take {n % 13} down. " for n in range(80))


QK = "components: {qk: {metric: attention}}"


def resolved(reader: CheckpointReader, text: str) -> ResolvedPlan:
    draft = parse_plan(f"format: 1\n{CALIBRATION}\n{text}", "p.yaml")
    return resolve(draft, reader.architecture, methods(), collectors())


def sensitivity(
    folder: Path, held_out: Tensor, *plans: ResolvedPlan, dtype: torch.dtype = torch.float32
) -> Sensitivity:
    from transformers import AutoTokenizer

    blocks = calibration_blocks(tokenize(AutoTokenizer.from_pretrained(folder), TEXT), 4, 32, 0)
    texts = Texts(Drawn((Source("counted", blocks, {}),), None, blocks), Drawn((), None, held_out))
    reader = CheckpointReader(folder)
    return Sensitivity(Setting(reader, plans, texts, torch.device("cpu"), dtype, 2))


def curves_of(measuring: Sensitivity, advance: Advance) -> list[Curve]:
    setting = measuring._setting
    blank = ALLOCATORS["sensitivity"].blank(setting.reader.architecture, setting.plans)
    return measuring.curves(blank, advance)


def loss(folder: Path, held_out: Tensor) -> float:
    model = lrc.load(folder, dtype=torch.float32)
    return float(window_losses(model, held_out).double().sum()) / (held_out.numel() - len(held_out))


@torch.no_grad()
def kl(folder: Path, source: Path, held_out: Tensor) -> float:
    """Return KL(source ‖ folder) per token, in float64, after all tokens but the last."""
    q, p = (lrc.load(each, dtype=torch.float32)(held_out).logits[:, :-1] for each in (folder, source))
    q, p = (logits.double().log_softmax(-1) for logits in (q, p))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture
def held_out() -> Tensor:
    return torch.randint(1, 256, (3, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("method", "layer", "target", "size"),
    [
        ("a3", 0, "qk", 2),
        ("a3", 1, "ov", 3),
        ("a3", 0, "mlp", 11),
        ("whitened_svd", 1, "o", 5),
        ("two_sided_svd", 0, "q", 4),
        ("two_sided_svd", 1, "o", 5),
    ],
)
def test_a_point_is_the_divergence_of_the_saved_model(
    tiny_checkpoint, tmp_path, held_out, family, method, layer, target, size
):
    source, text = tiny_checkpoint(family), tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    rule = f"layers: [{{match: {layer}, {target}: {{rank: {size}, method: {method}}}}}]"
    plan = tmp_path / "p.yaml"
    plan.write_text(f"format: 1\nrefit: none\n{CALIBRATION}\n{rule}\n", encoding="utf-8")
    lrc.compress(
        source, plan, out=tmp_path / "out", calib=str(text), ppl=[], run=lrc.Run(device="cpu", batch_size=2)
    )

    measuring = sensitivity(source, held_out, resolved(CheckpointReader(source), rule))
    (curve,) = curves_of(measuring, lambda done: None)
    assert (curve.layer, curve.target, curve.sizes) == (layer, target, (size,))
    assert measuring.loss == pytest.approx(loss(source, held_out), abs=1e-6)
    expected = kl(tmp_path / "out", source, held_out)
    assert expected > 1e-6  # else this shows nothing
    assert curve.costs[0] == pytest.approx(expected, rel=1e-2, abs=1e-7)


def at_full_size(source: Path, held_out: Tensor, dtype: torch.dtype) -> list[Curve]:
    """Return the curves of targets that are solved again without being shrunk."""
    plan = resolved(CheckpointReader(source), f"keep: 0.5\n{QK}")
    targets = CheckpointReader(source).architecture.targets
    full = tuple(
        replace(
            layer,
            assignments=tuple(
                replace(a, size=targets[a.target].full, kept=a.whole) for a in layer.assignments
            ),
        )
        for layer in plan.layers
    )
    measuring = sensitivity(source, held_out, replace(plan, layers=full), dtype=dtype)
    return curves_of(measuring, lambda done: None)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_nothing_is_lost_at_full_size(tiny_checkpoint, held_out, family):
    curves = at_full_size(tiny_checkpoint(family), held_out, torch.float32)
    assert len(curves) == 6
    for curve in curves:
        assert curve.sizes == (curve.full,)
        assert curve.costs[0] == pytest.approx(0, abs=2e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_half_precision_rounds_otherwise_is_no_cost(tiny_checkpoint, held_out, monkeypatch, family):
    source = tiny_checkpoint(family)
    found = at_full_size(source, held_out, torch.bfloat16)
    monkeypatch.setattr(Sensitivity, "_rounding", lambda *_: 0.0)
    raw = at_full_size(source, held_out, torch.bfloat16)
    # A target whose tensors did not change at all rounds nothing otherwise.
    changed = [(c.costs[0], r.costs[0]) for c, r in zip(found, raw, strict=True) if r.costs[0]]
    costs, rounded = (sum(each) for each in zip(*changed, strict=True))
    assert rounded > 5e-5  # else this shows nothing
    assert abs(costs) < rounded / 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_costs_in_half_precision_are_those_in_full(tiny_checkpoint, held_out, family):
    source = tiny_checkpoint(family)
    plan = resolved(CheckpointReader(source), f"keep: 0.7\n{QK}")
    exact, half = (
        sum(
            curve.costs[0]
            for curve in curves_of(sensitivity(source, held_out, plan, dtype=dtype), lambda done: None)
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half == pytest.approx(exact, rel=0.05)


def test_measures_what_it_says_and_tells_its_progress(tiny_checkpoint, held_out):
    source = tiny_checkpoint("llama")
    reader = CheckpointReader(source)
    plans = [
        resolved(reader, f"keep: {keep}\n{QK}\nlayers: [{{match: 0, mlp: keep-all}}]") for keep in (0.3, 0.6)
    ]
    blank, done = ALLOCATORS["sensitivity"].blank(reader.architecture, plans), []
    assert [(c.layer, c.target) for c in blank] == [(0, "qk"), (0, "ov"), (1, "qk"), (1, "ov"), (1, "mlp")]
    assert blank[0].sizes == (2, 4)
    assert blank[4] == Curve(1, "mlp", (14, 28), (14 * 96, 28 * 96), (0.0, 0.0), 48, 48 * 96, 48 * 96)
    measured = curves_of(sensitivity(source, held_out, *plans), done.append)
    assert [replace(c, costs=(0.0,) * len(c.costs)) for c in measured] == blank
    assert sum(done) == passes(reader.architecture, blank) == 2 * 4 + 6
    assert len(done) == 10


def test_a_model_whose_loss_is_not_finite_is_refused(tiny_checkpoint, held_out):
    from safetensors.torch import load_file, save_file

    source = tiny_checkpoint("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] *= 1e38
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="NaN or inf"):
        sensitivity(source, held_out)
