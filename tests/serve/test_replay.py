"""A state that is written late gives the outputs of one that is written with every token."""

import pytest
import torch

from hgrn2.ops import hgrn2_step
from hgrn2.serve import Engine, EngineOptions, Request, RequestSampling
from hgrn2.serve.replay import ReplaySettings, replay_output, replay_state
from tests.models.cases import config_of, make_model, tokens
from tests.refusals import refuses


def random(*shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.3, 4.0, 30.0])
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("settings", [ReplaySettings(0.7), ReplaySettings(1.0, "sigmoid", "silu")])
def test_outputs_and_states_are_those_of_single_steps(scale, bounded, settings):
    q, f, v = (random(2, 9, 3, 5, seed=i, scale=scale) for i in range(3))
    state = random(2, 3, 5, 5, seed=3)
    bound = random(3, 5, seed=4).sigmoid() if bounded else None
    checkpoint, m = state.clone(), 4
    for t in range(9):
        wanted, state = hgrn2_step(
            q[:, t], f[:, t], v[:, t], state, bound, scale=settings.scale, q_activation=settings.q_activation,
            v_activation=settings.v_activation, backend="reference",
        )  # fmt: skip
        first = t - t % m
        ring = f[:, first : t + 1], v[:, first : t + 1]
        torch.testing.assert_close(replay_output(q[:, t], *ring, checkpoint, bound, settings), wanted)
        if t % m == m - 1:
            # in place, and in float32 within its rounding
            low = [x.float() for x in (*ring, checkpoint)]
            single = replay_state(*low, None if bound is None else bound.float(), settings)
            place = checkpoint.data_ptr()
            checkpoint = replay_state(*ring, checkpoint, bound, settings)
            assert checkpoint.data_ptr() == place
            torch.testing.assert_close(checkpoint, state)
            torch.testing.assert_close(single.double(), state, rtol=1e-4, atol=1e-5 * float(state.abs().max()))


@pytest.mark.parametrize("write_every", [2, 5, 16])
@pytest.mark.parametrize("name", ["fla", "full-attention"])
def test_the_engine_writes_late(name, write_every):
    """Requests come and go in the middle of a ring, sessions pause there, and prefixes are taken there."""
    model = make_model(config_of(name))
    asked = [
        Request(tokens(3 + i, seed=i).tolist(), 5 + 3 * i, RequestSampling(0), return_logits=True, keep=True)
        for i in range(6)
    ]
    engine = Engine(model, EngineOptions(3, 2, write_every=write_every, context_limit=64, prefix_bytes=10**7))
    for request, found in zip(asked, engine.generate(asked), strict=True):
        wanted = model(torch.tensor([[*request.tokens, *found.tokens]]))[0][0, len(request.tokens) - 1 : -1]
        torch.testing.assert_close(torch.stack(found.logits), wanted, rtol=1e-8, atol=1e-9)
        session = engine.session(found.request_id)
        _, state = model(torch.tensor([session.tokens[: session.num_read]]))
        for key, x in state.tensors().items():
            torch.testing.assert_close(session.state.tensors()[key], x, rtol=1e-8, atol=1e-9)


def test_a_late_state_is_not_deterministic():
    with refuses("contradiction", "write_every", 4):
        EngineOptions(write_every=4, deterministic=True)
