"""Granite (arXiv:2405.04324 and later): Llama's layout, with factors on embedding, scores, halves and logits."""

from dataclasses import replace

from lrc.families.llama import FAMILY as LLAMA

FAMILY = replace(
    LLAMA,
    model_type="granite",
    residual_factor="residual_multiplier",
    logit_divisor="logits_scaling",
    tiny={
        **LLAMA.tiny,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.25,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
)
