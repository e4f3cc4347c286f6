"""GPT-NeoX and Pythia (arXiv:2304.01373): attention and MLP in parallel, q, k and v fused by head, partly rotated."""

from lrc.families.family import Family, Half, Stored

FUSED = Stored("attention.query_key_value", fused=("q", "k", "v"), order="by_head")

FAMILY = Family(
    model_type="gpt_neox",
    prefix="gpt_neox",
    layers="gpt_neox.layers",
    halves=(
        Half(
            "attention",
            module="attention",
            norm="input_layernorm",
            reads={"q": "attn_in", "k": "attn_in", "v": "attn_in", "o": "o_in"},
            output="o",
        ),
        Half(
            "mlp",
            module="mlp",
            norm="post_attention_layernorm",
            reads={"fc_in": "mlp_in", "fc_out": "down_in"},
            output="fc_out",
        ),
    ),
    projections={
        "q": FUSED,
        "k": FUSED,
        "v": FUSED,
        "o": Stored("attention.dense"),
        "fc_in": Stored("mlp.dense_h_to_4h"),
        "fc_out": Stored("mlp.dense_4h_to_h"),
    },
    final_norm="gpt_neox.final_layer_norm",
    embedding="gpt_neox.embed_in",
    old_names={"embed_out.": "lm_head."},
    rotary="half",
    rotary_share="partial_rotary_factor",
    parallel="use_parallel_residual",
    tiny={
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
)
