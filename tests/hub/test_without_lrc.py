"""What a process that never imports lrc makes of a compressed checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrc
from lrc.plan.schema import Calibration

SCRIPT = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, pipeline
folder = sys.argv[1]
for load in (
    AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained, lambda it: pipeline("text-generation", model=it)
):
    try:
        load(folder)
        print("loaded")
    except Exception as error:
        print(str(error).strip().splitlines()[-1])
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "compressed"
    plan = lrc.Plan(keep=0.5, method="svd", calibration=Calibration(samples=2, seq_len=32))
    lrc.compress("tiny-llama", plan, out=out, ppl=[], run=lrc.Run(device="cpu", dtype="float32"))
    return out


def lines(folder: Path, **environment: str) -> list[str]:
    """What a process without ``import lrc`` prints: a line each for a causal model, a base model and a pipeline."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=True,
    ).stdout.splitlines()


def test_where_lrc_is_installed_no_import_is_needed(output):
    found = lines(output)
    assert found == ["loaded"] * 3, "run `pip install -e .` again, if the entry point is not installed"


def test_where_it_is_not_the_last_line_says_so(output):
    found = lines(output, TORCH_DEVICE_BACKEND_AUTOLOAD="0")  # torch then ignores lrc's entry point
    assert len(found) == 3
    for line in found:
        assert "pip install lrc" in line
        assert "import lrc" in line


def test_a_model_loads_from_the_disk(output, tmp_path):
    ids = torch.arange(2, 12)[None]
    model = AutoModelForCausalLM.from_pretrained(output, device_map={"": "disk"}, offload_folder=tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)


def test_a_loaded_model_saves_no_notice(output, tmp_path):
    AutoModelForCausalLM.from_pretrained(output).save_pretrained(tmp_path)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        again, first = (AutoModelForCausalLM.from_pretrained(each)(ids).logits for each in (tmp_path, output))
    assert torch.equal(again, first)
