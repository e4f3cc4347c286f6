"""What tests share: the text data if it is at hand, and tiny random checkpoints."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import pytest

# Read once, when torch and huggingface_hub are first imported; xdist runs one process a core.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

COMMON = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": 256}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **COMMON},
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **COMMON,
    },
}


class TinyCheckpoint(Protocol):
    """Writes a new checkpoint folder of a family; keywords override its config."""

    def __call__(self, family: str, *, seed: int = 0, **config: Any) -> Path: ...


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of text data: LRC_DATA_DIR, or shared/data beside the repository."""
    folder = Path(os.environ.get("LRC_DATA_DIR") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no text data: {folder} is not a folder; set LRC_DATA_DIR")
    return folder


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> TinyCheckpoint:
    """Makes float32 checkpoints of 2 layers, 32 wide, 4 heads (llama: 2 of keys), 256 bytes as vocabulary."""
    return _checkpoints_in(tmp_path)


@pytest.fixture(scope="module")
def shared_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """The same for the tests of a whole file, which must leave them as they are."""
    return _checkpoints_in(tmp_path_factory.mktemp("shared"))


def _checkpoints_in(parent: Path) -> TinyCheckpoint:
    numbers = count()

    def make(family: str, *, seed: int = 0, **config: Any) -> Path:
        folder = parent / f"{family}-{next(numbers)}"
        save_random_model(folder, family, seed, config)
        save_byte_tokenizer(folder)
        return folder

    return make


def save_random_model(folder: Path, family: str, seed: int, config: dict[str, Any]) -> None:
    """Save a model whose every parameter is random: biases not zero, norms not one, attention not uniform."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **CONFIGS[family] | config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                around = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
                parameter.normal_(around, 0.2)
    model.save_pretrained(folder)


def save_byte_tokenizer(folder: Path) -> None:
    """Save a tokenizer whose ids are bytes, in the order of the byte-level alphabet; id 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
