import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hgrn2.models import HGRN2LM, HGRN2Config, presets
from hgrn2.models.cost import CacheCost, cache_costs, cost, cost_table
from hgrn2.nn.mixers import StateSpec, register_mixer
from hgrn2.nn.mixers.registry import forget_mixer
from tests.models.cases import NAMES, config_of
from tests.models.toy_mixer import Average, AverageOptions

BASE = {
    "vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 3, "expand_ratio": 32, "intermediate_size": 352
}  # fmt: skip
ATTENTION = {"layers": [0, 2], "num_heads": 4}


def config(**changes):
    return HGRN2Config.from_dict(BASE | changes)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_bytes_are_the_models(name):
    c, model = cost(config_of(name)), HGRN2LM(config_of(name))
    assert c.parameters == model.num_parameters() == sum(p.numel() for p in set(model.parameters()))
    assert c.state_bytes == model.init_state(1).num_bytes == model.init_state(5).num_bytes / 5
    assert c.weight_bytes == sum(p.nbytes for p in set(model.parameters()))
    assert c.checkpoint_bytes == 3 * c.weight_bytes


def test_state_of_a_sequence_by_hand():
    assert cost(config()).state_bytes == 3 * 128 * 32 * 4
    assert cost(config(use_short_conv=True)).state_bytes == 3 * (128 * 32 + 3 * 3 * 128) * 4
    # an attention layer has its position, and its cache grows: key and value of a float32 each, and whether it is one
    hybrid = cost(config(attn=ATTENTION | {"num_kv_heads": 2}))
    assert hybrid.state_bytes == 128 * 32 * 4 + 2 * 8
    assert hybrid.attention_bytes_per_token == 2 * (2 * 2 * 32 * 4 + 1)


def test_attention_caches_grow_as_said():
    model = HGRN2LM(config(attn=ATTENTION)).eval()
    ids = torch.zeros(1, 9, dtype=torch.long)
    with torch.no_grad():
        sizes = [model(ids[:, :n])[1].num_bytes for n in (1, 9)]
    assert sizes[1] - sizes[0] == 8 * cost(config(attn=ATTENTION)).attention_bytes_per_token


@pytest.mark.parametrize("window", [1, 2, 9])
def test_a_cache_keeps_as_many_tokens_as_said(window):
    changed = config(attn=ATTENTION | {"window_size": window})
    with torch.no_grad():
        _, state = HGRN2LM(changed).eval()(torch.zeros(1, 20, dtype=torch.long))
    kept = state.layers[0]["key"].shape[1]
    found = cost(changed)
    assert state.num_bytes == found.state_bytes + sum(cache.bytes_after(20) for cache in cache_costs(changed))
    if window == 1:
        # a query sees itself alone
        assert cache_costs(changed) == []
        assert (kept, found.attention_bytes_per_token, found.attention_window) == (0, 0, None)
        assert not any("cache" in line.label for line in cost_table(changed))
    else:
        assert kept == found.attention_window == cache_costs(changed)[0].limit == window - 1


class Hoard(Average):
    """Keeps every token."""

    def state_spec(self, dtype):
        return {"all": StateSpec((0, 8), dtype, grows=True), "few": StateSpec((0, 4), dtype, grows=True, limit=3)}


def test_caches_are_named_after_their_mixers_and_one_without_a_limit_hides_none():
    window = {"num_heads": 4, "window_size": 6}
    register_mixer("hoard", AverageOptions)(Hoard)
    try:
        both = config(layers=["attention", "hoard", "attention"], mixers={"attention": window})
        attention = 2 * (2 * 128 * 4 + 1)
        assert cache_costs(both) == [
            CacheCost("attention", attention, 5), CacheCost("hoard", 8 * 4, None), CacheCost("hoard", 4 * 4, 3)
        ]  # fmt: skip
        assert cost(both).attention_window is None
        assert cost(both).attention_bytes_per_token == attention + 12 * 4
        assert [(line.label, line.value) for line in cost_table(both) if "cache" in line.label] == [
            ("attention cache per token", attention), ("hoard cache per token", 32), ("hoard cache per token", 16)
        ]  # fmt: skip
        assert sum(cache.bytes_after(100) for cache in cache_costs(both)) == 5 * attention + 100 * 32 + 3 * 16
    finally:
        forget_mixer("hoard")


def test_the_usual_estimate():
    c = cost(config())
    assert c.embedding_parameters == 64 * 128
    assert c.flops_per_token_6n == 6 * (c.parameters - 64 * 128)
    tied = cost(config(tie_word_embeddings=True))
    assert tied.flops_per_token_6n == 6 * tied.parameters == c.flops_per_token_6n
    assert c.flops_per_token_training == 3 * c.flops_per_token_forward


@pytest.mark.parametrize("changes", [{}, {"use_bias": True}, {"tie_word_embeddings": True}, {"attn": ATTENTION}])
def test_products_are_those_torch_counts(changes):
    model = HGRN2LM(config(**changes)).eval()
    length = 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    counts = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    c = cost(config(**changes), seq_len=length)
    heads, k, chunk = 4, 32, 64
    # by hand, a token and head: scores and their sum over the chunk, state in and out; 6 joins of 32 decays
    scan = heads * ((chunk + 1) * k + 2 * chunk * k + 4 * k * k + 6 * k)
    layers = 3 - len(ATTENTION["layers"]) if "attn" in changes else 3
    attention = (3 - layers) * 4 * 128 * (length + 1) / 2
    assert c.flops_per_token_forward * length == linear + (layers * scan + attention) * length


def test_attention_in_a_window_costs_the_window():
    def attention(seq_len, window):
        plain = cost(config(attn=ATTENTION | {"window_size": 1}), seq_len).flops_per_token_forward
        return cost(config(attn=ATTENTION | {"window_size": window}), seq_len).flops_per_token_forward - plain

    # beyond the first: 4 D for every further key
    assert attention(1000, 1000) == attention(1000, None) == 2 * 4 * 128 * 999 / 2
    assert attention(4, 2) == pytest.approx(2 * 4 * 128 * 3 / 4)


def test_short_convolution_by_hand():
    more = cost(config(use_short_conv=True)).flops_per_token_forward - cost(config()).flops_per_token_forward
    assert more == 3 * 3 * 2 * 4 * 128


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"glu_activation": "none"},
        {"use_short_conv": True},
        {"block_norm": "layernorm", "mixer_norm": "layernorm"},
        {"elementwise_affine": False, "mixer_norm_affine": False},
        {"use_bias": True},
        {"min_log_decay": -3.0},
        {"dropout": 0.1},
        {"expand_ratio": 128},
        {"gate_range": "signed"},
        {"dense_state": 2},
        {"dense_state": 1, "gate_range": "signed"},
        {"dense_state": 1, "min_log_decay": -3.0},
        {"layers": "hgrn1"},
        {"layers": "hgrn1", "mixers": {"hgrn1": {"norm_before_gate": True, "norm": "layernorm"}}},
        {"layers": "hgrn1", "mixers": {"hgrn1": {"form": "real"}}},
        {"layers": "mamba"},
        {"layers": "griffin"},
        {"attn": {"layers": [0, 1, 2], "num_heads": 4}},
        {"attn": {"layers": [0, 2], "num_heads": 4, "num_kv_heads": 1, "rope_theta": None}},
    ],
)
def test_activations_are_what_torch_saves(changes):
    length = 256
    model = HGRN2LM(config(**changes)).train()
    found = cost(config(**changes), length)
    assert found.activation_bytes_per_token == pytest.approx(saved_bytes(model, length) / length, rel=0.15)
    with torch.autocast("cpu", torch.bfloat16):
        # what is kept whatever the length, such as lowered weights, goes with the difference
        measured = (saved_bytes(model, 2 * length) - saved_bytes(model, length)) / length
    if "attn" not in changes:
        assert found.activation_bytes_per_token_bfloat16 == pytest.approx(measured, rel=0.05)


def saved_bytes(model, length):
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            # the tensor is kept so that no other gets its place
            saved[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    ids = torch.randint(64, (1, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.hidden_states(ids)
    return sum(nbytes for nbytes, _ in saved.values())


def labels(**changes):
    return {(line.label, line.note): line.value for line in cost_table(config(**changes))}


def test_a_table_for_people():
    untied, tied, hybrid = labels(), labels(tie_word_embeddings=True), labels(attn=ATTENTION | {"window_size": 1024})
    assert untied["training FLOPs per token", "6 N, without the embedding"] == cost(config()).flops_per_token_6n
    assert not any("tied" in note for _, note in untied)
    assert tied["parameters (N)", "tied embedding counted once"] == cost(config(tie_word_embeddings=True)).parameters
    assert untied["weights", "bfloat16"] * 2 == untied["weights", "float32"] == 4 * untied["parameters (N)", ""]
    assert ("attention cache per token", "float32, up to 1,023 tokens") in hybrid
    assert not any("attention" in label for label, _ in untied)


def test_presets_cost_nothing_to_look_at():
    c = cost(presets.b1_3())
    assert c.parameters == 1_364_396_032
    assert c.state_bytes == 24 * 2048 * 128 * 4
