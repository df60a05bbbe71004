"""Transformers of the LLaMA family, opened as models whose layers all attend: transformers' own logits."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hgrn2.errors import UserError
from hgrn2.formats.convert import convert
from hgrn2.formats.layout import recognise
from hgrn2.formats.opening import open_folder
from hgrn2.models import HGRN2LM
from tests.formats.published import (
    LLAMA_1,
    LLAMA_2,
    LLAMA_3_ROPE,
    MISTRAL_01,
    MISTRAL_03,
    QWEN_2,
    QWEN_25,
    draw,
    tensors_of,
    write,
)
from tests.refusals import refuses

SIZE = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "initializer_range": 0.2,
}  # fmt: skip
# every model, with settings far from their defaults
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZE, num_key_value_heads=4, rms_norm_eps=0.01)),
    "llama, grouped, tied": (
        LlamaForCausalLM,
        LlamaConfig(
            **SIZE, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters={"rope_theta": 300.0},
            hidden_act="gelu",
        ),
    ),
    "llama, one head": (LlamaForCausalLM, LlamaConfig(**SIZE | {"num_attention_heads": 1}, num_key_value_heads=1)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZE, num_key_value_heads=2, rope_parameters={"rope_theta": 1e6})),
    "qwen2, window, tied": (
        Qwen2ForCausalLM,
        Qwen2Config(
            **SIZE, num_key_value_heads=1, tie_word_embeddings=True, use_sliding_window=True, sliding_window=5,
            max_window_layers=0,
        ),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=7)),
    "mistral, a key of others": (
        MistralForCausalLM, MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=3, use_sliding_window=False),
    ),
    "llama, keys of others": (
        LlamaForCausalLM,
        LlamaConfig(**SIZE, sliding_window=3, use_sliding_window=True, layer_types=["sliding_attention"] * 3),
    ),
    "mistral, no window": (MistralForCausalLM, MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=None)),
}  # fmt: skip


def make(name, seed=0):
    kind, config = MODELS[name]
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                # they begin at 1 and 0, where a mistake would not show
                parameter.copy_(torch.randn(parameter.shape) * 0.3 + ("norm" in key))
    return model


def opened(folder, dtype=torch.float32):
    found = open_folder(folder)
    model = HGRN2LM(found.config).to(dtype).eval()
    found.load_into(model)
    return model


class ExactPositions(nn.Module):
    """Rotary positions in the inputs' precision; transformers computes them in float32."""

    def __init__(self, theta, head_size):
        super().__init__()
        self.theta, self.head_size = theta, head_size

    def forward(self, x, position_ids):
        exponent = torch.arange(0, self.head_size, 2, dtype=x.dtype) / self.head_size
        angle = position_ids.unsqueeze(-1).to(x.dtype) * self.theta**-exponent
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()


def exact(model):
    """The model with norms and positions in float64, which transformers keeps in float32."""
    model = model.double()
    config = model.config
    heads = config.hidden_size // config.num_attention_heads
    model.model.rotary_emb = ExactPositions(config.rope_parameters["rope_theta"], heads)
    norms = [(name, module) for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")]
    for name, module in norms:
        norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=torch.float64)
        norm.weight = module.weight
        model.set_submodule(name, norm)
    assert len(norms) == 2 * config.num_hidden_layers + 1
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    theirs = make(name)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    ids = torch.randint(0, 90, (2, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = theirs(ids).logits
        torch.testing.assert_close(opened(tmp_path)(ids)[0], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        # and exactly: what float32 could hide is not there
        wanted = exact(theirs)(ids).logits
        ours = opened(tmp_path, torch.float64)(ids)[0]
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max()))


@pytest.mark.parametrize("to", ["hf", "fla"])
def test_a_whole_transformer_in_another_layout(to, tmp_path):
    import hgrn2.hf  # noqa: F401

    theirs = make("qwen2")
    theirs.save_pretrained(tmp_path / "qwen2")
    source = open_folder(tmp_path / "qwen2")
    convert(source, tmp_path / "out", to, tokenizer_dir=tmp_path / "qwen2")
    ids = torch.randint(0, 90, (1, 11), generator=torch.Generator().manual_seed(1))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
        written = found.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(written, theirs.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize(
    ("published", "heads", "window", "theta", "eps"),
    [
        (LLAMA_1, (32, 32), None, 1e4, 1e-6),
        (LLAMA_2, (32, 32), None, 1e4, 1e-5),
        (MISTRAL_01, (32, 8), 4096, 1e4, 1e-5),
        (MISTRAL_03, (32, 8), None, 1e6, 1e-5),
        (QWEN_2, (14, 2), None, 1e6, 1e-6),
        (QWEN_25, (14, 2), None, 1e6, 1e-6),
    ],
)
def test_published_settings(published, heads, window, theta, eps):
    config = recognise(published).read_config(published)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "tie_word_embeddings"):
        assert getattr(config, key) == published[key]
    assert config.norm_eps == eps
    attn = config.attn
    assert attn.layers == tuple(range(published["num_hidden_layers"]))
    assert (attn.num_heads, attn.num_kv_heads) == heads
    assert (attn.window_size, attn.rope_theta) == (window, theta)
    assert attn.qkv_bias == (published["model_type"] == "qwen2")


def llama_config(**changes):
    """As the first Llamas had it: no table of rotary positions, no head_dim."""
    return SIZE | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_scaling": None} | changes


def llama_tensors(**changes):
    shapes = {"model.embed_tokens.weight": (90, 32), "model.norm.weight": (32,), "lm_head.weight": (90, 32)}
    for i in range(3):
        layer = {
            "input_layernorm": (32,), "post_attention_layernorm": (32,), "self_attn.q_proj": (32, 32),
            "self_attn.k_proj": (32, 32), "self_attn.v_proj": (32, 32), "self_attn.o_proj": (32, 32),
            "mlp.gate_proj": (40, 32), "mlp.up_proj": (40, 32), "mlp.down_proj": (32, 40),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return draw(shapes) | changes


def test_old_files_with_frequencies_among_their_tensors(tmp_path):
    further = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    tensors = llama_tensors()
    model = opened(write(tmp_path / "old", llama_config(rope_theta=10000.0), tensors | further))
    plain = opened(write(tmp_path / "plain", llama_config(), tensors))
    ids = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids)[0], plain(ids)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads is 5, which does not divide hidden_size = 32"),
        ({"num_key_value_heads": 3}, "num_kv_heads is 3, which does not divide"),
        ({"num_key_value_heads": 2}, "6 misshapen: model.layers.0.self_attn.k_proj.weight"),
        ({"head_dim": 16}, "head_dim is 16; wanted hidden_size / num_attention_heads = 8"),
        ({"attention_bias": True}, "attention_bias is True; wanted False"),
        ({"mlp_bias": True}, "mlp_bias is True; wanted False"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; wanted 'silu' or 'swish' or 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
        # the type says more than the numbers that stand before it
        (LLAMA_3_ROPE, "rope_scaling of type 'llama3'; wanted none"),
        ({"rope_parameters": {"factor": 4.0, "rope_type": "yarn"}}, "rope_parameters of type 'yarn'"),
        ({"rope_scaling": {"factor": 4.0, "type": "default", "rope_type": "yarn"}}, "rope_scaling of type 'yarn'"),
        ({"rope_scaling": {"factor": 4.0, "type": "yarn", "rope_type": "default"}}, "rope_scaling of type 'yarn'"),
        ({"model_type": "qwen2", "use_mrope": True}, "use_mrope is True; wanted False"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 4.0}}, "rope_parameters.factor is 4.0"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": 7}, "rope_parameters is 7; wanted a table"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e5}, "rope_theta is 10000.0 and 500000.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; wanted 1"),
        ({"num_hidden_layers": 4}, "9 missing: model.layers.3."),
        ({"num_hidden_layers": 2}, "9 unexpected: model.layers.2."),
        ({"vocab_size": 91}, "2 misshapen: model.embed_tokens.weight [90, 32], wanted [91, 32]"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true, but"),
        ({"num_experts": 4}, "unknown key 'num_experts'"),
        ({"model_type": "qwen3"}, "model_type is 'qwen3', which has a norm on queries and keys"),
        ({"model_type": "qwen2"}, "9 missing: model.layers.0.self_attn.q_proj.bias"),
        ({"model_type": "gpt2"}, "wanted 'hgrn2', or of a Transformer one of llama, mistral, qwen2"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
            "wanted one kind for all 3 layers",
        ),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": None}, "max_window_layers is None"),
        ({"hidden_act": ["silu"]}, "hidden_act is ['silu']"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"rope_theta": "much"}, "attn.rope_theta is 'much'"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "no sliding_window is in use"),
        ({"model_type": "mistral", "sliding_window": "all"}, "attn.window_size is 'all'"),
        ({"hidden_size": "32"}, "hidden_size = '32'"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"num_hidden_layers": 4000}, "asks for 4000 layers"),
    ],
)
def test_what_our_attention_does_not_compute_is_refused(changes, message, tmp_path):
    with pytest.raises(UserError) as error:
        open_folder(write(tmp_path / "llama", llama_config(**changes), llama_tensors()))
    assert message in str(error.value)
    assert str(tmp_path / "llama") in str(error.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"])
def test_sizes_are_not_guessed(key, tmp_path):
    config = {name: value for name, value in llama_config().items() if name != key}
    with refuses("incomplete", "llama", key):
        open_folder(write(tmp_path / "llama", config, llama_tensors()))


def test_what_transformers_leaves_out_has_its_defaults(tmp_path):
    # of the model's class, when a file says nothing
    for kind, window in ((LlamaConfig, None), (MistralConfig, 4096), (Qwen2Config, None)):
        folder = tmp_path / kind.model_type
        settings = json.loads(kind(**SIZE).to_json_string(use_diff=False))
        few = {key: settings[key] for key in (*SIZE, "model_type")}
        tensors = llama_tensors()
        if kind is Qwen2Config:
            tensors |= {f"model.layers.{i}.self_attn.{x}_proj.bias": torch.zeros(32) for i in range(3) for x in "qkv"}
        attn = open_folder(write(folder, few, tensors)).config.attn
        assert (attn.window_size, attn.rope_theta) == (window, settings["rope_parameters"]["rope_theta"])
        assert tensors_of(folder).keys() == tensors.keys()
