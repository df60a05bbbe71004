"""Small checkpoints of the published layouts: names and shapes written out, not taken from our model."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

D, L, FF, VOCAB = 16, 3, 24, 300

FLA_CONFIG = {
    "architectures": ["HGRN2ForCausalLM"], "model_type": "hgrn2", "transformers_version": "4.48.0",
    "torch_dtype": "float32", "attn": None, "attn_mode": "chunk", "bos_token_id": 1, "conv_size": 4,
    "elementwise_affine": True, "eos_token_id": 2, "expand_ratio": 4, "fuse_cross_entropy": True, "fuse_norm": True,
    "fuse_swiglu": True, "hidden_act": "swish", "hidden_ratio": 4, "hidden_size": D, "initializer_range": 0.02,
    "intermediate_size": FF, "max_position_embeddings": 2048, "norm_eps": 0.01, "num_heads": 4, "num_hidden_layers": L,
    "tie_word_embeddings": False, "use_cache": True, "use_l2warp": False, "use_lower_bound": True,
    "use_short_conv": False, "vocab_size": VOCAB,
}  # fmt: skip
FLA_MODEL = {
    "model.embeddings.weight": (VOCAB, D), "model.lower_bounds": (L, D), "model.norm.weight": (D,),
    "lm_head.weight": (VOCAB, D),
}  # fmt: skip
FLA_BLOCK = {
    "attn_norm.weight": (D,), "mlp_norm.weight": (D,), "mlp.gate_proj.weight": (FF, D), "mlp.up_proj.weight": (FF, D),
    "mlp.down_proj.weight": (D, FF),
}  # fmt: skip
FLA_MIXER = {
    "attn.q_proj.weight": (D, D), "attn.f_proj.weight": (D, D), "attn.i_proj.weight": (D, D),
    "attn.o_proj.weight": (D, D), "attn.g_norm.weight": (D,),
}  # fmt: skip
FLA_CONVOLUTIONS = {f"attn.{name}_conv1d.weight": (D, 1, 4) for name in "qfi"}
# 4 heads of width 4 over 2 of keys and values, with biases
FLA_ATTENTION = {
    "attn.q_proj.weight": (D, D), "attn.k_proj.weight": (8, D), "attn.v_proj.weight": (8, D),
    "attn.o_proj.weight": (D, D), "attn.q_proj.bias": (D,), "attn.k_proj.bias": (8,), "attn.v_proj.bias": (8,),
}  # fmt: skip
HYBRID = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 5, "rope_theta": 500.0}

OFFICIAL_CONFIG = {
    "architectures": ["Hgrn2ForCausalLM"], "model_type": "hgrn2", "transformers_version": "4.31.0",
    "torch_dtype": "float32", "add_bos_token": False, "bias": False, "bos_token_id": 0, "causal": True,
    "decoder_embed_dim": D, "decoder_layers": L, "eos_token_id": 2, "expand_ratio": 4, "glu_act": "none",
    "glu_dim": FF, "in_act": "none", "init_std": 0.02, "no_scale_embedding": True, "norm_type": "simplermsnorm",
    "out_act": "silu", "pad_token_id": 1, "use_cache": True, "tie_word_embeddings": False, "vocab_size": VOCAB,
}  # fmt: skip
OFFICIAL_MODEL = {"model.embed_tokens.weight": (VOCAB, D), "model.lower_bounds": (L, D), "lm_head.weight": (VOCAB, D)}
OFFICIAL_LAYER = {
    "token_mixer.in_proj.weight": (3 * D, D), "token_mixer.out_proj.weight": (D, D), "channel_mixer.l1.weight": (FF, D),
    "channel_mixer.l2.weight": (FF, D), "channel_mixer.l3.weight": (D, FF),
}  # fmt: skip
# with norm_type "layernorm" and biases
OFFICIAL_FURTHER = {
    "token_mixer.in_proj.bias": (3 * D,), "token_mixer.out_proj.bias": (D,), "channel_mixer.l1.bias": (FF,),
    "channel_mixer.l2.bias": (FF,), "channel_mixer.l3.bias": (D,), "token_norm.weight": (D,), "token_norm.bias": (D,),
    "token_mixer.norm.weight": (D,), "token_mixer.norm.bias": (D,), "channel_norm.weight": (D,),
    "channel_norm.bias": (D,),
}  # fmt: skip

# the config.json of Transformers as they were published, in their real sizes
LLAMA_1 = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 2048,
    "max_sequence_length": 2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "pad_token_id": 0, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.28.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA_2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
# Llama 3.1 and later; positions are scaled
LLAMA_3_ROPE = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
MISTRAL_01 = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
MISTRAL_03 = MISTRAL_01 | {
    "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None, "transformers_version": "4.42.0.dev0",
    "vocab_size": 32768,
}  # fmt: skip
QWEN_2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 131072, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN_25 = QWEN_2 | {"max_position_embeddings": 32768, "sliding_window": 32768, "use_mrope": False}


def draw(shapes, dtype=torch.float32, seed=0):
    """Tensors far from their initial values, so that every part shows."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5
        tensors[name] = (noise + ("norm.weight" in name)).to(dtype)
    return tensors


def fla_shapes(convolutions=False, hybrid=False, tied=False, lower_bound=True):
    shapes = {name: shape for name, shape in FLA_MODEL.items() if not (tied and name == "lm_head.weight")}
    if not lower_bound:
        del shapes["model.lower_bounds"]
    for layer in range(L):
        mixer = FLA_MIXER | (FLA_CONVOLUTIONS if convolutions else {})
        parts = FLA_BLOCK | (FLA_ATTENTION if hybrid and layer in HYBRID["layers"] else mixer)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    return shapes


def merged(tensors):
    """As fla wrote it before February 2025: the gate's rows, then those of up."""
    old = {}
    for name, x in tensors.items():
        if ".gate_proj." in name:
            x = torch.cat([x, tensors[name.replace("gate_proj", "up_proj")]])
        if ".up_proj." not in name:
            old[name] = x
    return old


def official_shapes(further=False, tied=False):
    shapes = {name: shape for name, shape in OFFICIAL_MODEL.items() if not (tied and name == "lm_head.weight")}
    if further:
        shapes |= {"model.final_norm.weight": (D,), "model.final_norm.bias": (D,)}
    for layer in range(L):
        parts = OFFICIAL_LAYER | (OFFICIAL_FURTHER if further else {})
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    return shapes


def write(folder: Path, config, tensors) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_shards(folder: Path, config, tensors, count=2) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    places = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(places.values())):
        save_file({name: x for name, x in tensors.items() if places[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def tensors_of(folder: Path):
    """Tensors of all safetensors files of a folder."""
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
        assert found[name].contiguous().view(torch.uint8).equal(x.contiguous().view(torch.uint8)), name
