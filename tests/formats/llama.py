"""A small Llama of the published layout, drawn at random."""

from __future__ import annotations

from tests.formats.published import draw

D, L, FF, VOCAB = 16, 4, 24, 260
LLAMA = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": FF, "num_hidden_layers": L,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 0.01, "initializer_range": 0.05,
    "bos_token_id": 7, "eos_token_id": 0, "torch_dtype": "float32",
}  # fmt: skip


def shapes(biases=False):
    found = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,), "lm_head.weight": (VOCAB, D)}
    for i in range(L):
        layer = {
            "input_layernorm": (D,), "post_attention_layernorm": (D,), "self_attn.q_proj": (D, D),
            "self_attn.k_proj": (8, D), "self_attn.v_proj": (8, D), "self_attn.o_proj": (D, D),
            "mlp.gate_proj": (FF, D), "mlp.up_proj": (FF, D), "mlp.down_proj": (D, FF),
        }  # fmt: skip
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        if biases:
            found |= {f"model.layers.{i}.self_attn.{x}_proj.bias": (D if x == "q" else 8,) for x in "qkv"}
    return found


TENSORS = draw(shapes())
