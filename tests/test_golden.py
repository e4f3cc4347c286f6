"""The weights that every shipped plan writes, as SHA-256: a change of the code that should change none is held to it.

``python tests/test_golden.py`` writes the file anew, for a change that is meant to change bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).with_name("golden.json")
CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = ("tiny-gpt2", "tiny-llama")
# Ranks of llama-7b-projections are above those of the built-in models, so these take its place.
RANKS = {"q": 40, "k": 24, "v": 24, "o": 40, "gate": 48, "up": 48, "down": 48, "fc_in": 48, "fc_out": 48}
OWN = {"tiny-gpt2": ("fc_in", "fc_out"), "tiny-llama": ("gate", "up", "down")}
# What no shipped plan asks for: sizes found, gradients of single projections, tables.
OTHERS = {
    "fisher": "format: 1\nkeep: 0.6\nallocate: fisher\nprojections: {embed: {method: whitened_svd, rank: 48}}\n",
    "importance": "format: 1\nkeep: 0.6\nmethod: two_sided_svd\nallocate: importance\n",
}
# One thread, and the kernels that every x86-64 processor has: sums are rounded alike on all of them.
SAME_EVERYWHERE = {
    "OMP_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Prescott",  # of scipy
    "HF_HUB_OFFLINE": "1",
}


def small_plan(name: str, text: str, model: str) -> str:
    """A plan's text with four blocks of 128 tokens for calibration, and ranks that the model has."""
    if name == "llama-7b-projections":
        roles = ("q", "k", "v", "o", *OWN[model])
        ranks = "".join(f"  {role}: {{rank: {RANKS[role]}}}\n" for role in roles)
        text = re.sub(r"(?m)^projections:\n(  .*\n)+", f"projections:\n{ranks}", text)
    few = "samples: 4, seq_len: 128, gradient_samples: 2"
    if "calibration: {" in text:
        return text.replace("calibration: {", f"calibration: {{{few}, ")
    return f"{text}calibration: {{{few}}}\n"


def write_first_layers(model: str, folder: Path, layers: int = 2) -> None:
    """Write a built-in model with its first layers alone."""
    from safetensors.numpy import load_file, save_file

    from lrc.hub.names import ASSETS

    shutil.copytree(ASSETS / model, folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    kept = {name: t for name, t in tensors.items() if int((*re.findall(r"\.(\d+)\.", name), 0)[0]) < layers}
    save_file(kept, weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["n_layer" if "n_layer" in config else "num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def weights_sha256(folder: Path) -> str:
    """Hash of every tensor's name, type, shape and bytes, whatever files they are in."""
    from safetensors.numpy import load_file

    total = hashlib.sha256()
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        total.update(tensor.tobytes())
    return total.hexdigest()


def leave_out_what_writes_no_weights() -> None:
    """Draw no page in this process, and tokenize the built-in text once for each model."""
    import lrc.text.encoding
    import lrc.verbs.compress

    tokenize, known = lrc.text.encoding.tokenize, {}

    def tokenize_once(tokenizer: Any, text: str, rows: int | None = None, first: int | None = None) -> Any:
        key = tokenizer.name_or_path, text, rows, first
        if key not in known:
            known[key] = tokenize(tokenizer, text, rows, first)
        return known[key].clone()

    lrc.text.encoding.tokenize = tokenize_once
    lrc.verbs.compress.html_page = lambda report, others: ""


def compress_all() -> dict[str, str]:
    """The hash of each model's weights by each plan."""
    import lrc

    leave_out_what_writes_no_weights()
    plans = {path.stem: path.read_text(encoding="utf-8") for path in sorted(CONFIGS.glob("*.yaml"))}
    found = {}
    with tempfile.TemporaryDirectory() as work:
        for model in MODELS:
            source = Path(work) / model
            write_first_layers(model, source)
            for name, text in (plans | OTHERS).items():
                plan, out = Path(work) / f"{name}.yaml", Path(work) / f"{model}-{name}"
                plan.write_text(small_plan(name, text, model), encoding="utf-8")
                lrc.compress(
                    source,
                    plan,
                    out=out,
                    calib="builtin",
                    ppl=[],
                    run=lrc.Run(device="cpu", dtype="float32", batch_size=4),
                )
                found[f"{model} {name}"] = weights_sha256(out)
    return found


@pytest.fixture(scope="module")
def weights() -> dict[str, str]:
    command = [sys.executable, __file__, "--print"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | SAME_EVERYWHERE
    )
    return json.loads(result.stdout)


def test_every_shipped_plan_writes_the_same_weights(weights: dict[str, str]) -> None:
    assert weights == json.loads(GOLDEN.read_text(encoding="utf-8"))


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        json.dump(compress_all(), sys.stdout)
    else:
        run = subprocess.run(
            [sys.executable, __file__, "--print"],
            stdout=subprocess.PIPE,
            check=True,
            env=os.environ | SAME_EVERYWHERE,
        )
        GOLDEN.write_text(json.dumps(json.loads(run.stdout), indent=1) + "\n", encoding="utf-8")
