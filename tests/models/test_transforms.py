"""Models under transforms of torch.func against loops: vmap over weights and over tokens, gradients for each sample."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap

from hgrn2 import HGRN2LM, HGRN2Config
from hgrn2.models.outputs import LossOutput
from tests.refusals import refuses

VOCAB = 17
MODELS = {
    "hgrn2": {},
    "conv": {"conv_size": 3, "tie_word_embeddings": True},
    "attention": {"layers": ["hgrn2", "attention"], "mixers": {"attention": {"num_heads": 2, "window_size": 3}}},
    "gla": {"layers": ["gla"], "mixers": {"gla": {"num_heads": 2}}},
    "griffin": {"layers": ["griffin"]},
    "hgrn1": {"layers": ["hgrn1"]},
    "mamba": {"layers": ["mamba"]},
    "rwkv5": {"layers": ["rwkv5"], "mixers": {"rwkv5": {"head_size": 8}}},
    "rwkv6": {"layers": ["rwkv6"], "mixers": {"rwkv6": {"head_size": 8}}},
}
kinds = pytest.mark.parametrize("kind", MODELS)
backends = pytest.mark.parametrize("backend", ["chunked", "reference"])


# torch has no rule for its own attention
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*_scaled_dot_product_flash_attention_for_cpu:UserWarning"),
]


def build(kind, backend="auto", count=1):
    config = HGRN2Config(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, expand_ratio=8, **MODELS[kind])
    torch.manual_seed(0)
    return [HGRN2LM(config, backend).double() for _ in range(count)]


def tokens(seed, *shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@kinds
@backends
def test_vmap_over_weights(kind, backend):
    models = build(kind, backend, 2)
    params, _ = stack_module_state(models)
    ids = tokens(0, 2, 6)
    found = vmap(lambda p: functional_call(models[0], p, (ids,))[0])(params)
    torch.testing.assert_close(found, torch.stack([model(ids)[0] for model in models]))


@kinds
@backends
def test_vmap_over_tokens_and_gradients_for_each_sample(kind, backend):
    (model,) = build(kind, backend)
    ids, targets = tokens(1, 3, 1, 6), tokens(2, 3, 1, 6)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, ids, targets):
        return functional_call(model, params, (ids,), {"targets": targets}).mean

    torch.testing.assert_close(vmap(lambda x: model(x)[0])(ids), torch.stack([model(x)[0] for x in ids]))
    found = vmap(grad(loss), (None, 0, 0))(params, ids, targets)
    for i in range(3):
        model.zero_grad()
        model.loss(ids[i], targets[i]).mean.backward()
        for name, p in model.named_parameters():
            wanted = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(found[name][i], wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_vmap_over_a_state_a_step_and_a_mask():
    (model,) = build("attention")
    ids, mask = tokens(3, 2, 3, 6), torch.ones(2, 3, 6, dtype=torch.bool)
    mask[0, 1, :2], mask[1, 2, :4] = False, False

    def run(ids, mask):
        logits, state = model(ids, attention_mask=mask)
        return logits, model.step(ids[:, 0], state)[0]

    logits, after = vmap(run)(ids, mask)
    for i in range(2):
        wanted, wanted_after = run(ids[i], mask[i])
        torch.testing.assert_close(logits[i][mask[i]], wanted[mask[i]])
        torch.testing.assert_close(after[i], wanted_after)


def test_packed_sequences_under_vmap():
    ids, bounds = tokens(4, 2, 1, 6), torch.tensor([0, 2, 6])
    for kind in ("conv", "attention"):
        models = build(kind, count=2)
        params, _ = stack_module_state(models)
        found = vmap(lambda p, models=models: functional_call(models[0], p, (ids[0], None, bounds))[0])(params)
        torch.testing.assert_close(found, torch.stack([model(ids[0], None, bounds)[0] for model in models]))
    with refuses("unsupported", "cu_seqlens", "vmap"):
        vmap(lambda x: models[0](ids[0], None, x)[0])(bounds.expand(2, -1))


def test_ids_are_checked_where_vmap_does_not_hide_them():
    (model,) = build("hgrn2")
    params, _ = stack_module_state([model])
    with refuses("invalid-value", "input_ids", VOCAB):
        vmap(lambda p: functional_call(model, p, (torch.tensor([[VOCAB]]),))[0])(params)


def test_generation_under_vmap_is_refused():
    (model,) = build("hgrn2")
    with refuses("unsupported", "vmap"):
        vmap(lambda x: model.generate(x, 2))(tokens(5, 2, 1, 3))


def test_a_loss_can_be_printed_under_vmap():
    (model,) = build("hgrn2")
    printed = []

    def run(x):
        out = model.loss(x, x)
        assert isinstance(out, LossOutput)
        printed.append(repr(out))
        return out.mean

    vmap(run)(tokens(6, 2, 1, 3))
    assert "vmap" in printed[0]
