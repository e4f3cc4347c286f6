"""Phi-3 and Phi-4 mini (arXiv:2404.14219): Llama with q, k and v in one matrix, gate and up in another."""

from dataclasses import replace

from lrc.families.family import Stored
from lrc.families.llama import FAMILY as LLAMA

QKV = Stored("self_attn.qkv_proj", fused=("q", "k", "v"))
GATE_UP = Stored("mlp.gate_up_proj", fused=("gate", "up"))

FAMILY = replace(
    LLAMA,
    model_type="phi3",
    projections={
        **LLAMA.projections,
        **dict.fromkeys(QKV.fused, QKV),
        **dict.fromkeys(GATE_UP.fused, GATE_UP),
    },
    split_mlp={"gate": "gate_proj", "up": "up_proj"},
    activation="activation_fn",
    rotary_share="partial_rotary_factor",
    window="config.sliding_window",
    tiny={**LLAMA.tiny, "partial_rotary_factor": 0.5, "sliding_window": 8, "pad_token_id": 0},
)
