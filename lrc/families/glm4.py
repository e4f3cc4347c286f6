"""GLM-4-0414: GLM with a norm after each half too."""

from dataclasses import replace

from lrc.families.glm import FAMILY as GLM

ATTENTION, MLP = GLM.halves

FAMILY = replace(
    GLM,
    model_type="glm4",
    halves=(
        replace(ATTENTION, post_norm="post_self_attn_layernorm"),
        replace(MLP, post_norm="post_mlp_layernorm"),
    ),
)
