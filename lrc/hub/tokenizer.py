"""Load the tokenizer of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from lrc.errors import UserError


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a checkpoint's folder; raise UserError if there is none that works."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers, tokenizers and sentencepiece each raise their own
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"{folder} has no tokenizer that works ({reason}); copy the model's tokenizer.json into it"
        ) from error


def start_tokens(config: PreTrainedConfig) -> Iterator[int]:
    """Yield the tokens that may precede a text: the config's BOS token, then its EOS tokens."""
    ends = config.eos_token_id
    yield from (
        t for t in (config.bos_token_id, *(ends if isinstance(ends, list) else [ends])) if t is not None
    )
