"""Mistral (arXiv:2310.06825): the layout of Llama, with a sliding window in all layers or none."""

from dataclasses import replace

from lrc.families.llama import FAMILY as LLAMA

FAMILY = replace(
    LLAMA,
    model_type="mistral",
    window="config.sliding_window",
    tiny={**LLAMA.tiny, "sliding_window": 8},
)
