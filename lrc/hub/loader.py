"""Load a causal language model, compressed or not, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lrc.checkpoint.headers import read_headers
from lrc.errors import UserError
from lrc.families import families
from lrc.hub.names import resolve_model
from lrc.modules.fused.fuse import fuse as merge


def load(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    allow_pickle: bool = False,
    fuse: bool = False,
    **kwargs: Any,
) -> transformers.PreTrainedModel:
    """Load a model in eval mode; ``model`` is a folder, a hub id, a short name or a built-in.

    ``fuse`` applies ``lrc.fuse`` for faster inference; ``kwargs`` go to ``from_pretrained``. Raises UserError for an
    unknown model, one that is no causal language model, a damaged file, or pickled weights without ``allow_pickle``.
    """
    folder = resolve_model(str(model), revision=revision, allow_pickle=allow_pickle).path
    config = causal_config(folder, trust_remote_code=kwargs.get("trust_remote_code", False))
    files = sorted(folder.glob("*.safetensors"))
    if not files and not allow_pickle:
        raise UserError(
            f"{folder} has no safetensors weights; --allow-pickle (allow_pickle) reads pickled ones"
        )
    read_headers(files)
    family = families().get(config.get_text_config().model_type)
    if family is not None and not family.sdpa:
        kwargs.setdefault(
            "attn_implementation", "eager"
        )  # transformers before 5.21 takes sdpa, without soft caps
    if device is not None:
        kwargs["device_map"] = {"": torch.device(device)}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs).eval()
    if fuse:
        merge(loaded)
    return loaded


def causal_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Read a model's config; raise UserError if it cannot be used or is of no causal language model."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError) as error:
        if "custom code" in str(error) and not trust_remote_code:
            message = f"{folder} needs Python code that it ships; pass --trust-remote-code if you trust it"
            raise UserError(message) from error
        raise UserError(f"{folder / 'config.json'} cannot be used: {str(error).splitlines()[0]}") from error
    if not trust_remote_code and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{folder} is a {config.model_type} model, not a causal language model")
    return config


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> transformers.PreTrainedTokenizerBase:
    """Load the tokenizer in a checkpoint's folder; raise UserError if there is none that works."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers, tokenizers and sentencepiece each raise their own
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        message = f"{folder} has no tokenizer that works ({reason}); copy the model's tokenizer.json into it"
        raise UserError(message) from error


def first_token(config: Any, tokenizer: transformers.PreTrainedTokenizerBase) -> int | None:
    """Return the token that every block and window of a model starts with; None if its family needs none.

    Raises UserError if the tokenizer has no such token.
    """
    model_type = config.get_text_config().model_type
    family = families().get(model_type)
    if family is None or not family.starts_texts:
        return None
    token: Any = tokenizer.bos_token_id
    if token is None:
        raise UserError(
            f"{model_type} needs its BOS token at the start of every text, and the tokenizer has none; set bos_token "
            "in tokenizer_config.json"
        )
    return token


def start_tokens(config: transformers.PreTrainedConfig) -> Iterator[int]:
    """Yield the tokens that may precede a text: the config's BOS token, then its EOS tokens."""
    ends = config.eos_token_id
    tokens = [config.bos_token_id, *(ends if isinstance(ends, list) else [ends])]
    yield from (token for token in tokens if token is not None)
