"""GPT-2: learned positions, biases everywhere, q, k and v fused in one input-major matrix."""

from lrc.families.family import Family, Half, Stored

FUSED = ("q", "k", "v")

FAMILY = Family(
    model_type="gpt2",
    prefix="transformer",
    layers="transformer.h",
    halves=(
        Half(
            "attention",
            module="attn",
            norm="ln_1",
            reads={"q": "attn_in", "k": "attn_in", "v": "attn_in", "o": "o_in"},
            output="o",
        ),
        Half(
            "mlp",
            module="mlp",
            norm="ln_2",
            reads={"fc_in": "mlp_in", "fc_out": "down_in"},
            output="fc_out",
        ),
    ),
    projections={
        "q": Stored("attn.c_attn", fused=FUSED, input_major=True),
        "k": Stored("attn.c_attn", fused=FUSED, input_major=True),
        "v": Stored("attn.c_attn", fused=FUSED, input_major=True),
        "o": Stored("attn.c_proj", input_major=True),
        "fc_in": Stored("mlp.c_fc", input_major=True),
        "fc_out": Stored("mlp.c_proj", input_major=True),
    },
    final_norm="transformer.ln_f",
    embedding="transformer.wte",
    rotary="none",
    tiny={"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    dropout="attn_dropout.p",
    output_dropout="resid_dropout",
    # reorder_and_upcast_attn changes precision and order of the scores; calibration has no input for cross-attention.
    unsupported={"reorder_and_upcast_attn": True, "add_cross_attention": True},
)
