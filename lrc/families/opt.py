"""OPT (arXiv:2205.01068): learned positions, biases, and the MLP's projections on the layer itself."""

from lrc.families.family import Family, Half, Stored

FAMILY = Family(
    model_type="opt",
    prefix="model",
    layers="model.decoder.layers",
    halves=(
        Half(
            "attention",
            module="self_attn",
            norm="self_attn_layer_norm",
            reads={"q": "attn_in", "k": "attn_in", "v": "attn_in", "o": "o_in"},
            output="o",
        ),
        Half(
            "mlp",
            module="",
            norm="final_layer_norm",
            reads={"fc_in": "mlp_in", "fc_out": "down_in"},
            output="fc_out",
        ),
    ),
    projections={
        "q": Stored("self_attn.q_proj"),
        "k": Stored("self_attn.k_proj"),
        "v": Stored("self_attn.v_proj"),
        "o": Stored("self_attn.out_proj"),
        "fc_in": Stored("fc1"),
        "fc_out": Stored("fc2"),
    },
    final_norm="model.decoder.final_layer_norm",
    embedding="model.decoder.embed_tokens",
    rotary="none",
    split={"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"},
    dropout="dropout",
    queries_scaled=True,
    activation="activation_fn",
    # Norms behind the halves, as in the 350M model, belong to the residual stream itself.
    unsupported={
        "do_layer_norm_before": False,
        "_remove_final_layer_norm": True,
        "layer_norm_elementwise_affine": False,
    },
    equal=(("word_embed_proj_dim", "hidden_size"),),
    tiny={
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "pad_token_id": 1,
    },
)
