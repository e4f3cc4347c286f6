"""Load a causal language model, compressed or not, from a folder or by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lrc.checkpoint.headers import read_headers
from lrc.errors import UserError
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
) -> PreTrainedModel:
    """Load a model in eval mode; ``model`` is a folder, a hub id, a short name or a built-in.

    ``fuse`` applies ``lrc.fuse`` for faster inference; ``kwargs`` go to ``from_pretrained``. Raises UserError for an
    unknown model, one that is no causal language model, a damaged file, or pickled weights without ``allow_pickle``.
    """
    folder = resolve_model(str(model), revision=revision, allow_pickle=allow_pickle).path
    causal_config(folder, trust_remote_code=kwargs.get("trust_remote_code", False))
    files = sorted(folder.glob("*.safetensors"))
    if not files and not allow_pickle:
        raise UserError(
            f"{folder} has no safetensors weights; pickled ones are read only with allow_pickle (--allow-pickle)"
        )
    read_headers(files)
    if device is not None:
        kwargs["device_map"] = {"": torch.device(device)}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs).eval()
    if fuse:
        merge(loaded)
    return loaded


def causal_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Read a model's config; raise UserError if it cannot be used or is of no causal language model."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError) as error:
        if "custom code" in str(error) and not trust_remote_code:
            raise UserError(
                f"{folder} needs Python code that it ships; pass --trust-remote-code if you trust that code"
            ) from error
        raise UserError(f"{folder / 'config.json'} cannot be used: {str(error).splitlines()[0]}") from error
    if not trust_remote_code and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{folder} is a {config.model_type} model, not a causal language model")
    return config
