"""Activations computed again in the backward pass: the same numbers in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hgrn2.models import HGRN2LM, HGRN2Config
from tests.models.cases import FULL, SIZE, config_of, make_model, tokens

WINDOW = {"layers": [1], "num_heads": 2, "window_size": 5}


def results(model: HGRN2LM, on: bool, loss: Any = None, **settings: Any) -> list[torch.Tensor]:
    """The loss, the new state and every gradient of one step."""
    model.activation_checkpointing = on
    model.zero_grad()
    torch.manual_seed(3)
    length = 40 if "cu_seqlens" in settings else 20
    batch = 1 if "cu_seqlens" in settings else 2
    found = (loss or model.loss)(tokens(batch, length), tokens(batch, length, seed=2), **settings)
    found.mean.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [found.sum.detach(), *found.state.detach().tensors().values(), *gradients]


def assert_same(model: HGRN2LM, **settings: Any) -> None:
    wanted, found = results(model, False, **settings), results(model, True, **settings)
    assert len(wanted) == len(found)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("keep_state", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"dropout": 0.3}, {"use_short_conv": True, "min_log_decay": -0.5}, {"attn": FULL, "dropout": 0.3}],
    ids=["plain", "dropout", "convolution", "hybrid"],
)
def test_losses_states_and_gradients_are_the_same_to_the_last_bit(changes, packed, keep_state):
    model = make_model(HGRN2Config.from_dict(SIZE | changes), torch.float32).train()
    packing = {"cu_seqlens": torch.tensor([0, 9, 9, 40])} if packed else {}
    assert_same(model, keep_state=keep_state, **packing)


def test_the_same_from_a_state_and_under_autocast():
    model = make_model(HGRN2Config.from_dict(SIZE | {"attn": WINDOW, "dropout": 0.2}), torch.float32).train()
    with torch.no_grad():
        state = model(tokens(2, 7))[1]
    assert_same(model, state=state)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model, state=state)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_same_where_it_is_compiled():
    config = HGRN2Config.from_dict(SIZE | {"dropout": 0.3, "num_hidden_layers": 2})
    model = make_model(config, torch.float32).train()
    packing = {"cu_seqlens": torch.tensor([0, 9, 40])}
    found = []
    for on in (False, True):
        torch._dynamo.reset()
        loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
        found.append(results(model, on, loss, keep_state=False, **packing))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    torch._dynamo.reset()


def test_nothing_is_computed_twice_without_gradients():
    model = make_model(config_of("fla"), torch.float32)
    model.activation_checkpointing = True
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(tokens(1, 5))
    assert len(calls) == 1
    model.loss(tokens(1, 5), tokens(1, 5)).mean.backward()
    assert len(calls) == 3


def test_it_takes_less_memory():
    config = HGRN2Config(vocab_size=64, hidden_size=64, num_hidden_layers=8, num_heads=2, intermediate_size=192)
    model = HGRN2LM(config).train()
    ids = torch.randint(64, (1, 2048))

    def kept_bytes(on: bool) -> int:
        """Bytes that are alive between the forward and the backward pass."""
        model.activation_checkpointing = on
        with torch.profiler.profile(profile_memory=True) as profile:
            kept = model.hidden_states(ids, keep_state=False)[0]
        del kept
        assert profile.profiler is not None
        events: Any = profile.profiler.kineto_results.events()
        return sum(event.nbytes() for event in events if event.name() == "[memory]")

    # the input of each layer, of some twenty tensors of this size
    assert kept_bytes(True) < kept_bytes(False) / 6
