"""GLM-4 9B (arXiv:2406.12793): Llama with interleaved rotary positions on a part of each head; gate and up fused."""

from dataclasses import replace

from lrc.families.llama import FAMILY as LLAMA
from lrc.families.phi3 import FAMILY as PHI3
from lrc.families.phi3 import GATE_UP

FAMILY = replace(
    LLAMA,
    model_type="glm",
    projections={**LLAMA.projections, **dict.fromkeys(GATE_UP.fused, GATE_UP)},
    split_mlp=PHI3.split_mlp,
    activation=PHI3.activation,
    rotary="interleaved",
    rotary_share="partial_rotary_factor",
    tiny={**LLAMA.tiny, "head_dim": 8, "attention_bias": True, "pad_token_id": 0},
)
