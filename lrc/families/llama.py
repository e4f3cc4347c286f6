"""Llama (arXiv:2302.13971) and what follows its layout: rotary positions, grouped queries, SwiGLU, RMSNorm."""

from lrc.families.family import Family, Stored

FAMILY = Family(
    model_type="llama",
    prefix="model",
    layers="model.layers",
    attention="self_attn",
    mlp="mlp",
    mlp_norm="post_attention_layernorm",
    projections={
        "q": Stored("self_attn.q_proj"),
        "k": Stored("self_attn.k_proj"),
        "v": Stored("self_attn.v_proj"),
        "o": Stored("self_attn.o_proj"),
        "gate": Stored("mlp.gate_proj"),
        "up": Stored("mlp.up_proj"),
        "down": Stored("mlp.down_proj"),
    },
    final_norm="model.norm",
    embedding="model.embed_tokens",
    rotary="half",
    norm_epsilon="variance_epsilon",
    stale=("rotary_emb.inv_freq",),
)
