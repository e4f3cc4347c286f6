"""Name the argument by which transformers hands over the KV cache, which differs between releases and families."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lrc.errors import UserError

NAMES = ("cache", "past_key_values", "layer_past")  # the first since transformers 5.24, the last in GPT-NeoX


def cache_argument(forward: Callable[..., Any]) -> str:
    """Return the name of ``forward``'s argument for the cache.

    Raises UserError if it has none: without a cache, each new token would see no token before it.
    """
    taken = inspect.signature(forward).parameters
    found = next((name for name in NAMES if name in taken), None)
    if found is None:
        import transformers

        raise UserError(
            f"transformers {transformers.__version__} hands over the KV cache by a name that lrc does not know "
            f"({', '.join(NAMES)}); pip install --upgrade lrc, or install an older transformers"
        )
    return found
