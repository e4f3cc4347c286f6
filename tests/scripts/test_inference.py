"""Random compressed models are what ``lrc compress`` stores, and load as it does."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import lrc
from lrc.modules.fused.fuse import fuse

pytestmark = pytest.mark.usefixtures("without_pages")

CPU = torch.device("cpu")


@pytest.fixture
def inference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("inference")


def shapes(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as stored:
        return {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118


def table(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]


@pytest.mark.parametrize("components", ["", "components: {qk: {metric: score}}\n"])
@pytest.mark.parametrize("method", ["a3", "whitened_svd"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_modules_are_those_of_a_compression(
    inference: ModuleType, tiny_checkpoint: Any, tmp_path: Path, family: str, method: str, components: str
) -> None:
    if components and method != "a3":
        pytest.skip("components are a3's")
    source = tiny_checkpoint(family, **({"attention_bias": True} if family == "llama" else {}))
    text = inference.plan_text(method, 0.5) + components
    plan, calibration = tmp_path / "plan.yaml", tmp_path / "text.txt"
    plan.write_text(text + "calibration: {samples: 4}\n", encoding="utf-8")
    calibration.write_text(
        "It was a bright cold day in April, and the clocks struck. " * 20, encoding="utf-8"
    )
    lrc.compress(
        source, plan, calib=str(calibration), out=tmp_path / "made", ppl=[], run=lrc.Run(device="cpu")
    )
    config = lrc.load(source).config
    reduced = inference.reduce(config, text)
    model = inference.draw_reduced(config, reduced, torch.float32, CPU)
    model.save_pretrained(tmp_path / "drawn")
    assert table(tmp_path / "drawn") == table(tmp_path / "made")
    assert shapes(tmp_path / "drawn") == shapes(tmp_path / "made")
    loaded, tokens = lrc.load(tmp_path / "drawn"), torch.arange(16)[None]
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.equal(loaded(tokens).logits, logits)
        assert logits.isfinite().all()
        fuse(model)
        torch.testing.assert_close(model(tokens).logits, logits, atol=1e-5, rtol=1e-5)


def test_the_table(inference: ModuleType, tmp_path: Path) -> None:
    options = [
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--layers",
        "1",
        "--repeats",
        "2",
        "--new-tokens",
        "2",
    ]
    cases = ["--prefill", "1x16", "--decode", "2x16", "--keeps", "0.6", "--fusion", "none,both"]
    argv = ["tiny", *options, *cases, "--out", str(tmp_path / "figures.json")]
    result = CliRunner().invoke(inference.app, argv, catch_exceptions=False)
    rows = [line.split(" | ") for line in result.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == [
        f"| {method} 0.6, {merged} merged"
        for method in ("a3", "whitened_svd")
        for merged in ("none", "both")
        for _ in range(2)
    ]
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert [f"{row['speedup']:.3f}" for rows in figures.values() for row in rows] == [row[4] for row in rows]
