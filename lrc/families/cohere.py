"""Command R: attention and MLP in parallel behind one norm, interleaved rotary positions, norms of q and k in some."""

from dataclasses import replace

from lrc.families.llama import FAMILY as LLAMA

ATTENTION, MLP = LLAMA.halves

FAMILY = replace(
    LLAMA,
    model_type="cohere",
    halves=(ATTENTION, replace(MLP, norm=ATTENTION.norm)),
    norm_epsilon=None,
    rotary="interleaved",
    qk_norm="head",
    qk_norm_key="use_qk_norm",
    parallel=True,
    logit_factor="logit_scale",
    tiny={**LLAMA.tiny, "use_qk_norm": True, "logit_scale": 0.5, "pad_token_id": 0},
)
