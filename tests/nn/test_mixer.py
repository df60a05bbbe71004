"""The mixer on its own, as somebody who builds another model takes it."""

from __future__ import annotations

import pytest
import torch

from hgrn2.nn.mixer import HGRN2Mixer


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("conv_size", [0, 4])
def test_is_ready_to_be_trained(nan_filled_memory, norm, conv_size):
    torch.manual_seed(0)
    mixer = HGRN2Mixer(32, 16, norm=norm, conv_size=conv_size, bias=True)
    assert all(x.isfinite().all() and x.abs().max() <= 1 for x in mixer.parameters())
    y, _ = mixer(torch.randn(2, 20, 32), None)
    y.square().sum().backward()
    for name, x in mixer.named_parameters():
        assert x.grad is not None, name
        assert x.grad.isfinite().all(), name
    # a normed signal of size 1, through a projection
    assert 0.1 < float(y.detach().square().mean().sqrt()) < 2


def test_a_floor_is_for_training_alone():
    torch.manual_seed(0)
    x, bound = torch.randn(1, 30, 32), torch.full((32,), 0.1)
    mixer = HGRN2Mixer(32, 16, min_log_decay=-0.1)
    plain = HGRN2Mixer(32, 16)
    plain.load_state_dict(mixer.state_dict())
    wanted = plain(x, bound)[0]
    assert not torch.allclose(mixer(x, bound)[0], wanted, atol=1e-2)
    assert torch.equal(mixer.eval()(x, bound)[0], wanted)


def test_a_floor_holds_whether_tokens_come_one_by_one_or_together():
    torch.manual_seed(0)
    x = torch.randn(1, 10, 32)
    mixer = HGRN2Mixer(32, 16, min_log_decay=-0.1)
    whole, _ = mixer(x, None)
    outputs, state = [], None
    for token in x.unbind(1):
        y, state = mixer(token[:, None], None, state)
        outputs.append(y)
    assert torch.allclose(torch.cat(outputs, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"norm": "nosuch"}, "norm is 'nosuch'; wanted one of 'rmsnorm'"),
        ({"norm_eps": -1.0}, "eps is -1.0; wanted at least 0"),
        ({"q_activation": "relu"}, "q_activation is 'relu'; wanted one of"),
        ({"v_activation": "relu"}, "v_activation is 'relu'; wanted one of"),
        ({"conv_size": -1}, "conv_size is -1"),
        ({"hidden_size": 17}, "hidden_size is 17 and expand_ratio 8"),
        ({"hidden_size": 4}, "hidden_size is 4 and expand_ratio 8"),
        ({"expand_ratio": 0}, "hidden_size is 16 and expand_ratio 0"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        HGRN2Mixer(**({"hidden_size": 16, "expand_ratio": 8} | settings))


def test_a_bound_split_in_heads_is_refused():
    with pytest.raises(ValueError, match=r"lower_bound has shape \[2, 8\]; wanted \[D\] with D=16"):
        HGRN2Mixer(16, 8)(torch.randn(1, 3, 16), torch.zeros(2, 8))


@pytest.mark.parametrize("floor", [0, 0.5, float("nan"), -70, "-3"])
def test_a_floor_that_is_none_is_refused(floor):
    with pytest.raises(ValueError, match=r"min_log_decay is .*; wanted a number in \[-69, 0\), or None"):
        HGRN2Mixer(16, 8, min_log_decay=floor)


def test_a_compiled_mixer_equals_an_eager_one():
    torch.manual_seed(0)
    mixer = HGRN2Mixer(32, 16, v_activation="silu", min_log_decay=-0.1)
    x = torch.randn(1, 70, 32)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    outputs = [call(x, None)[0] for call in (compiled, mixer)]
    found, wanted = (torch.autograd.grad(y.square().sum(), list(mixer.parameters())) for y in outputs)
    assert torch.allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
