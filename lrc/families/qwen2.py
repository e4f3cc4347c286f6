"""Qwen2 and 2.5 (arXiv:2407.10671): the layout of Llama with biases on q, k and v; later layers may have a window."""

from dataclasses import replace

from lrc.families.llama import FAMILY as LLAMA

FAMILY = replace(
    LLAMA,
    model_type="qwen2",
    window="sliding_window",
    tiny={**LLAMA.tiny, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
)
