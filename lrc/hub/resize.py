"""Change the number of tokens of a model whose embedding or head is factorized."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lrc.errors import UserError
from lrc.families import family_of
from lrc.modules.low_rank import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resize_tables(
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> nn.Module:
    """Return the embedding, resized with the head and the config, as transformers' ``resize_token_embeddings`` does.

    A new token gets the mean row of the first factor, so ``mean_resizing`` cannot be switched off.
    """
    family, table = family_of(model.config.model_type), model.config.quantization_config["modules"]
    modules: dict[str, Any] = {
        family.embedding: model.get_input_embeddings(),
        family.head: model.get_output_embeddings(),
    }
    embedding = modules[family.embedding]
    if not mean_resizing:
        raise UserError("a factorized embedding grows by mean rows only; leave mean_resizing out")
    if any(
        each and type(each) not in (nn.Linear, nn.Embedding) and not isinstance(each, Pair)
        for each in modules.values()
    ):
        raise UserError("resize the embedding before adapters are added to it or to the head")
    step = pad_to_multiple_of or 1
    count = -(-(embedding.num_embeddings if new_num_tokens is None else new_num_tokens) // step) * step
    if count < 1:
        raise UserError(f"an embedding of {count} tokens is none; the smallest has 1")
    resized: dict[int, nn.Parameter] = {}  # a tied head shares its factors
    for path, module in modules.items():
        if module is None:
            continue
        rows = module.B if isinstance(module, Pair) else module
        for name, old in rows.named_parameters(recurse=False):
            setattr(rows, name, resized.setdefault(id(old), _with_rows(old, count)))
        setattr(module, "num_embeddings" if module is embedding else "out_features", count)
        if path in table:
            table[path]["tokens" if module is embedding else "out"] = count
    model.config.get_text_config().vocab_size = model.vocab_size = count  # type: ignore[assignment]
    return embedding


def _with_rows(old: nn.Parameter, count: int) -> nn.Parameter:
    """Return the first rows of a parameter, or all and their mean as often as needed."""
    more = old.float().mean(0, keepdim=True).to(old.dtype).expand(max(count - len(old), 0), *old.shape[1:])
    return nn.Parameter(torch.cat([old[:count], more]).detach(), requires_grad=old.requires_grad)
