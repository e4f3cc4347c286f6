"""Match the tensors of a checkpoint with the model of its config.json, as transformers matches them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lrc.checkpoint.headers import Shape, StoredTensor
from lrc.errors import UserError
from lrc.families import Family

# Buffers in old checkpoints that transformers passes over, beside those that a model class lists.
_OLD_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


@dataclass(frozen=True)
class Match:
    """``stored``: the name in the files of each tensor that the model uses, by its name in the model.

    ``unused``: tensors of the files that the model has no place for, except buffers of old checkpoints.
    """

    stored: dict[str, str]
    unused: list[str]


def match(located: Mapping[str, StoredTensor], model: nn.Module, family: Family) -> Match:
    """Match tensors by name with a model.

    Names may lack the prefix of its base model, have it twice, or be old ones.
    """
    expected, prefix = model.state_dict(), f"{family.prefix}."
    full = {}
    for name in located:
        new = family.own_name(name)
        once, more = new.removeprefix(prefix), f"{prefix}{new}"
        full[once if once != new and once in expected else more if more in expected else new] = name
    old = re.compile("|".join((*(model._keys_to_ignore_on_load_unexpected or ()), *_OLD_BUFFERS)))  # type: ignore[arg-type]
    stored = {name: held for name, held in full.items() if name in expected}
    return Match(stored, [name for name in full if name not in expected and not old.search(name)])


def check_layers(located: Mapping[str, StoredTensor], family: Family, config: Any) -> None:
    """Raise UserError if the config says less than one decoder layer, or more than the files hold."""
    path = re.escape(family.layers.removeprefix(f"{family.prefix}."))
    pattern = re.compile(rf"(?:{family.prefix}\.){{0,2}}{path}\.(\d+)\.")
    found = [pattern.match(family.own_name(name)) for name in located]
    if config.num_hidden_layers < 1:
        raise UserError(f"config.json: num_hidden_layers: {config.num_hidden_layers} is less than 1")
    held = 1 + max((int(each[1]) for each in found if each), default=-1)
    if held < config.num_hidden_layers:
        start = f", such as {min(located)!r}" if located else ""
        raise UserError(
            f"config.json says {config.num_hidden_layers} layers; the files hold {held} layers under {family.layers} "
            f"and {len(located)} tensors in all{start}"
        )


def check_match(
    found: Match, located: Mapping[str, StoredTensor], expected: Mapping[str, Shape], config: Any
) -> None:
    """Check that the tensors fill a model whose tensors are to have the shapes ``expected``.

    Raises UserError for a tensor that is missing, has another shape or is not of floating point. Also for a bias that
    the model lacks, because without it the model computes something else.
    """
    for name in found.unused:
        parent, _, kind = name.rpartition(".")
        if kind == "bias" and f"{parent}.weight" in expected:
            raise UserError(f"the files hold {name!r}, which the model of config.json lacks{_biases(config)}")
    if missing := [name for name in expected if name not in found.stored]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        unused = f"; the files hold {found.unused[0]!r}, which the model lacks" if found.unused else ""
        keys = _biases(config) if missing[0].endswith(".bias") else ""
        raise UserError(f"the checkpoint has no tensor {missing[0]!r}{more}{keys}{unused}")
    for name, shape in expected.items():
        stored = located[found.stored[name]]
        if stored.shape != shape:
            raise UserError(
                f"{stored.file}: tensor {name!r} has shape {list(stored.shape)}, the model of config.json has "
                f"{list(shape)}{_dimensions(config, stored.shape, shape)}"
            )
        if not stored.dtype.is_floating_point:
            raise UserError(
                f"{stored.file}: tensor {name!r} is stored as {stored.dtype}; lrc compresses floating-point weights"
            )


def _biases(config: Any) -> str:
    keys = {key: value for key, value in vars(config).items() if key.endswith("bias")}
    return f" ({', '.join(f'{key}: {str(value).lower()}' for key, value in keys.items())})" if keys else ""


def _dimensions(config: Any, stored: Shape, expected: Shape) -> str:
    """Name the keys of the config that give the dimensions that differ."""
    differing = {size for size, held in zip(expected, stored, strict=False) if size != held}
    numbers = {key: value for key, value in vars(config).items() if type(value) is int}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = [
        f"{key}: {value}"
        for key, value in numbers.items()
        if value in differing or (key.endswith("heads") and value * head in differing)
    ]
    return f" ({', '.join(keys)})" if keys else ""
