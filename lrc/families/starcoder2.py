"""StarCoder2 (arXiv:2402.19173): rotary positions and grouped queries, with LayerNorm, biases and a plain MLP."""

from dataclasses import replace

from lrc.families.family import Stored
from lrc.families.llama import FAMILY as LLAMA

ATTENTION, MLP = LLAMA.halves

FAMILY = replace(
    LLAMA,
    model_type="starcoder2",
    halves=(ATTENTION, replace(MLP, reads={"fc_in": "mlp_in", "fc_out": "down_in"}, output="fc_out")),
    projections={
        **{role: LLAMA.projections[role] for role in "qkvo"},
        "fc_in": Stored("mlp.c_fc"),
        "fc_out": Stored("mlp.c_proj"),
    },
    norm_epsilon=None,
    output_dropout="residual_dropout",
    window="config.sliding_window",
    tiny={**LLAMA.tiny, "sliding_window": 8},
)
