"""Gemma 2 (arXiv:2408.00118): norms before and after each half, 1 + w, soft caps, every other layer with a window."""

from dataclasses import replace

from lrc.families.llama import FAMILY as LLAMA

ATTENTION, MLP = LLAMA.halves

FAMILY = replace(
    LLAMA,
    model_type="gemma2",
    halves=(
        replace(ATTENTION, post_norm="post_attention_layernorm"),
        replace(MLP, norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"),
    ),
    norm_epsilon="eps",
    norm_offset=1,
    window="sliding_window",
    score_cap="attn_logit_softcapping",
    logit_cap="final_logit_softcapping",
    sdpa=False,
    embedding_scaled=True,
    starts_texts=True,
    unsupported={"use_bidirectional_attention": True},
    tiny={**LLAMA.tiny, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 16},
)
