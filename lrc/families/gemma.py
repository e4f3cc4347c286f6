"""Gemma (arXiv:2403.08295): the layout of Llama with 1 + w norms and a scaled embedding."""

from dataclasses import replace

from lrc.families.llama import FAMILY as LLAMA

FAMILY = replace(
    LLAMA,
    model_type="gemma",
    norm_epsilon="eps",
    norm_offset=1,
    embedding_scaled=True,
    starts_texts=True,
    unsupported={"use_bidirectional_attention": True},
    tiny={**LLAMA.tiny, "head_dim": 8, "intermediate_size": 128},  # Gemma's MLPs are wide
)
