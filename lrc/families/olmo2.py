"""OLMo 2 (arXiv:2501.00656): norms after each half, none before; one over all query heads, one over all key heads."""

from dataclasses import replace

from lrc.families.llama import FAMILY as LLAMA

ATTENTION, MLP = LLAMA.halves

FAMILY = replace(
    LLAMA,
    model_type="olmo2",
    halves=(
        replace(ATTENTION, norm=None, post_norm="post_attention_layernorm"),
        replace(MLP, norm=None, post_norm="post_feedforward_layernorm"),
    ),
    qk_norm="width",
)
