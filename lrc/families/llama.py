"""Llama (arXiv:2302.13971) and what follows its layout: rotary positions, grouped queries, SwiGLU, RMSNorm."""

from lrc.families.family import Family, Half, Stored

FAMILY = Family(
    model_type="llama",
    prefix="model",
    layers="model.layers",
    halves=(
        Half(
            "attention",
            module="self_attn",
            norm="input_layernorm",
            reads={"q": "attn_in", "k": "attn_in", "v": "attn_in", "o": "o_in"},
            output="o",
        ),
        Half(
            "mlp",
            module="mlp",
            norm="post_attention_layernorm",
            reads={"gate": "mlp_in", "up": "mlp_in", "down": "down_in"},
            output="down",
        ),
    ),
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
    tiny={
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    norm_epsilon="variance_epsilon",
)
