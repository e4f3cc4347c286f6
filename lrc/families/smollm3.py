"""SmolLM3: the layout of Llama; every fourth layer has no rotary positions (arXiv:2501.18795)."""

from dataclasses import replace

from lrc.families.llama import FAMILY as LLAMA

FAMILY = replace(
    LLAMA,
    model_type="smollm3",
    rotates="use_rope",
    window="sliding_window",
    tiny={**LLAMA.tiny, "no_rope_layer_interval": 2, "pad_token_id": 0},
)
