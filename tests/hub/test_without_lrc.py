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

INSTALLED, MISSING = (
    {},
    {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
)  # without its entry point, as if lrc was not installed
CALLS = {
    "causal": "from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])",
    "base": "from transformers import AutoModel as A; A.from_pretrained(sys.argv[1])",
    "pipeline": "from transformers import pipeline; pipeline('text-generation', model=sys.argv[1])",
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "compressed"
    plan = lrc.Plan(keep=0.5, method="svd", calibration={"samples": 2, "seq_len": 32})
    lrc.compress("tiny-llama", plan, out=out, ppl=[], run=lrc.Run(device="cpu", dtype="float32"))
    return out


def call(script: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    script = f"import sys; {script}; assert 'lrc' in sys.modules"
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize("script", CALLS.values(), ids=CALLS)
def test_where_lrc_is_installed_no_import_is_needed(output, script):
    result = call(script, output, INSTALLED)
    assert result.returncode == 0, f"{result.stderr}\n(run `pip install -e .` again: the entry point is new)"


@pytest.mark.parametrize("script", CALLS.values(), ids=CALLS)
def test_where_it_is_not_the_last_line_says_so(output, script):
    result = call(script, output, MISSING)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "pip install lrc" in last
    assert "import lrc" in last


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
