"""The layers of a cache, as the library asks them."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from hgrn2.hf import StateLayer
from hgrn2.hf.cache import CACHE_NAME
from tests.hf.cases import KINDS, both, tokens
from tests.refusals import refuses


def filled(model, count, cache=None):
    with torch.no_grad():
        return model(tokens(2, count), use_cache=True, **{CACHE_NAME: cache})[CACHE_NAME]


@pytest.mark.parametrize("name", KINDS)
def test_what_a_cache_says_of_itself(name):
    _, model = both(name)
    kinds = model.config.layer_types
    cache = DynamicCache(config=model.config)
    layers = model.model.state_layers(cache)
    # the library makes tensors for layers that have none yet, where it can
    cache.early_initialization(2, 1, 1, torch.float32, torch.device("cpu"))
    assert not any(layer.is_initialized or layer.state for layer in layers)
    assert cache.is_sliding == [kind == "sliding_attention" for kind in kinds]
    filled(model, 7, cache)
    assert all(layer.is_initialized and layer.get_mask_sizes(3) == (10, 0) for layer in layers)
    assert cache.get_max_length() == -1
    static = StaticCache(config=model.config, max_cache_len=9)
    model.model.state_layers(static)
    assert static.get_max_length() == (9 if "full_attention" in kinds else -1)
    assert static.is_compileable


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_kept_beside_the_state(name):
    _, model = both(name)
    cache = filled(model, 40)
    tensors = [x for layer in cache.layers for x in layer.state.values()]
    assert tensors
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors)
    cache.reset()
    # what grows is gone, what has one size is zero
    for layer in cache.layers:
        assert bool(layer.state) == (layer.kind == "linear_attention")
        assert not any(x.any() for x in layer.state.values())


@pytest.mark.parametrize("name", KINDS)
def test_states_of_one_size_are_marked_for_the_compiler(name, monkeypatch):
    marked = []
    monkeypatch.setattr(torch._dynamo, "mark_static_address", marked.append)
    _, model = both(name)
    cache = filled(model, 5, StaticCache(config=model.config, max_cache_len=15))
    filled(model, 1, cache)
    assert [id(x) for layer in cache.layers for x in layer.state.values()] == [id(x) for x in marked]


def test_the_count_of_tokens_lies_beside_the_state():
    # in a CUDA graph nothing may lie on the CPU
    layer = StateLayer("linear_attention")
    layer.replace({"recurrent": torch.zeros(1, 2, device="meta")}, 3)
    assert layer.num_tokens.device.type == "meta"


def test_another_model_is_told():
    _, model = both("fla")
    cache = filled(model, 5)
    config = LlamaConfig(
        vocab_size=29, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    with refuses("mismatch", "cache", "HGRN2"):
        llama(tokens(2, 1), **{CACHE_NAME: cache})
    with refuses("mismatch", "cache", "HGRN2"):
        cache.layers[0].lazy_initialization(None, None)


@pytest.mark.parametrize("kind", ["linear_attention", "full_attention"])
def test_what_another_model_filled_is_refused(kind):
    _, model = both("full-attention")
    cache = DynamicCache(config=model.config)
    i = model.config.layer_types.index(kind)
    if kind == "linear_attention":
        cache.update_conv_state(torch.zeros(2, 3, 4), i)
    else:
        cache.update(torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 4), i)
    with refuses("mismatch", f"layer {i}"):
        filled(model, 3, cache)
