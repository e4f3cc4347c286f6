"""What a key of measurements says of texts, so that the same texts are found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lrc.plan.schema import Calibration
from lrc.text.blocks import gradient_blocks, ids_sha256


def blocks_key(blocks: Tensor) -> str:
    """What a key says of blocks (n, tokens): how many there are, how long, and the hash of their ids."""
    return f"{blocks.shape[0]} x {blocks.shape[1]} {ids_sha256(blocks)}"


def gradients_key(blocks: Tensor, settings: Calibration) -> str:
    """What a key says of the gradients of calibration blocks: which of them, and the seed of the labels."""
    chosen = gradient_blocks(blocks, settings.gradient_samples, settings.seed)
    return f"{blocks_key(chosen)} seed {settings.seed}"


def digest(key: Mapping[str, Any]) -> str:
    """A few letters for a key, so that each has a file of its own."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
