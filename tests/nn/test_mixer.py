"""The mixer on its own, as somebody who builds another model takes it."""

from __future__ import annotations

import pytest
import torch

from hgrn2 import HGRN2Config, HGRN2Mixer
from hgrn2.nn.mixers import Context
from tests.refusals import refuses


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
    ("settings", "code", "names"),
    [
        ({"norm": "nosuch"}, "invalid-value", ["norm", "'nosuch'", "'rmsnorm'"]),
        ({"norm_eps": -1.0}, "invalid-value", ["eps", "-1.0"]),
        ({"norm_eps": "x"}, "invalid-value", ["eps", "'x'"]),
        ({"scale": "1"}, "invalid-value", ["scale", "'1'"]),
        ({"scale": float("nan")}, "invalid-value", ["scale", "nan"]),
        ({"backend": "fast"}, "unknown-name", ["backend", "'fast'"]),
        ({"conv_size": 2.5}, "invalid-value", ["conv_size", "2.5"]),
        ({"hidden_size": "16"}, "invalid-value", ["hidden_size", "'16'"]),
        ({"hidden_size": 16.0}, "invalid-value", ["hidden_size", "16.0"]),
        ({"num_heads": 4}, "contradiction", ["num_heads is 4", "expand_ratio is 2"]),
        ({"num_heads": 3, "expand_ratio": None}, "contradiction", ["hidden_size", "num_heads"]),
        ({"expand_ratio": None}, "contradiction", ["hidden_size", "16", "expand_ratio", "num_heads"]),
        ({"q_activation": "relu"}, "invalid-value", ["q_activation", "'relu'"]),
        ({"v_activation": "relu"}, "invalid-value", ["v_activation", "'relu'"]),
        ({"conv_size": -1}, "invalid-value", ["conv_size", "-1"]),
        ({"hidden_size": 17}, "contradiction", ["hidden_size is 17", "expand_ratio = 8"]),
        ({"hidden_size": 4}, "contradiction", ["hidden_size is 4", "expand_ratio = 8"]),
        ({"expand_ratio": 0}, "invalid-value", ["expand_ratio", "0"]),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(settings, code, names):
    with refuses(code, *names):
        HGRN2Mixer(**({"hidden_size": 16, "expand_ratio": 8} | settings))


def test_a_bound_may_be_split_in_heads_as_the_scan_takes_it():
    torch.manual_seed(0)
    mixer, x, bound = HGRN2Mixer(16, 8), torch.randn(1, 3, 16), torch.rand(16)
    assert torch.equal(mixer(x, bound)[0], mixer(x, bound.view(2, 8))[0])
    assert not torch.equal(mixer(x, bound)[0], mixer(x)[0])


def test_sizes_of_heads_follow_from_each_other():
    assert HGRN2Mixer(64, num_heads=4).expand_ratio == HGRN2Mixer(64, 16).expand_ratio == 16
    assert HGRN2Mixer(256).num_heads == HGRN2Mixer(256, 128, num_heads=2).num_heads == 2
    # the same scale as a model's
    assert HGRN2Mixer(64, 16).scale == HGRN2Config(hidden_size=64, expand_ratio=16).head_scale
    assert "2 heads of 8 x 8" in str(HGRN2Mixer(16, 8))


X, BOUND = torch.ones(2, 3, 16), torch.full((16,), 0.5)
STATE = {"recurrent": torch.zeros(2, 2, 8, 8)}


@pytest.mark.parametrize(
    ("arguments", "code", "names"),
    [
        ({"x": X[0]}, "invalid-value", ["x", "torch.float32", "[3, 16]"]),
        ({"x": X[..., :8]}, "invalid-value", ["x", "[2, 3, 8]"]),
        ({"x": bytearray(3)}, "invalid-value", ["x is a bytearray"]),
        ({"x": [1.0]}, "invalid-value", ["x is a list"]),
        ({"x": X.double()}, "mismatch", ["x has", "torch.float64", "torch.float32"]),
        ({"x": X.long()}, "mismatch", ["torch.int64"]),
        ({"x": X.to("meta")}, "invalid-value", ["x is on meta", "cpu"]),
        ({"lower_bound": BOUND.double()}, "invalid-value", ["lower_bound", "torch.float64", "torch.float32"]),
        ({"lower_bound": BOUND.bfloat16()}, "invalid-value", ["lower_bound", "torch.bfloat16"]),
        ({"lower_bound": BOUND.view(8, 2)}, "invalid-value", ["lower_bound", "[16]", "[2, 8]"]),
        ({"lower_bound": 0.5}, "invalid-value", ["lower_bound", "0.5"]),
        ({"lower_bound": bytearray(3)}, "invalid-value", ["lower_bound", "bytearray"]),
        ({"lower_bound": BOUND * torch.nan}, "invalid-value", ["lower_bound", "nan"]),
        ({"lower_bound": BOUND * 2}, "invalid-value", ["lower_bound", "from 1 to 1"]),
        ({"lower_bound": BOUND.to("meta")}, "invalid-value", ["lower_bound", "meta", "cpu"]),
        ({"state": {}}, "invalid-value", ["state", "recurrent", "init_state"]),
        ({"state": STATE["recurrent"]}, "invalid-value", ["state", "tensor"]),
        (
            {"state": {"recurrent": STATE["recurrent"][:1]}},
            "invalid-value",
            ["recurrent", "[1, 2, 8, 8]", "[2, 2, 8, 8]"],
        ),
        ({"state": {"recurrent": STATE["recurrent"].half()}}, "invalid-value", ["recurrent", "torch.float16"]),
        ({"state": {"recurrent": STATE["recurrent"].to("meta")}}, "invalid-value", ["recurrent", "meta", "cpu"]),
        ({"mask": torch.ones(2, 4)}, "invalid-value", ["mask", "[2, 4]", "[2, 3]"]),
        ({"mask": [1]}, "invalid-value", ["mask", "list"]),
        ({"mask": torch.ones(2, 3, device="meta")}, "invalid-value", ["mask", "meta", "cpu"]),
        ({"cu_seqlens": torch.tensor([0, 3])}, "contradiction", ["cu_seqlens", "batch is 2"]),
        ({"x": X[:1], "cu_seqlens": [0, 3]}, "invalid-value", ["cu_seqlens", "list"]),
        ({"x": X[:1], "cu_seqlens": torch.tensor([0, 2])}, "invalid-value", ["cu_seqlens", "[0, 2]"]),
        (
            {"x": X[:1], "cu_seqlens": torch.tensor([0, 3]), "mask": torch.ones(1, 3)},
            "contradiction",
            ["mask", "cu_seqlens"],
        ),
    ],
)
@pytest.mark.parametrize("conv_size", [0, 4])
def test_errors_name_the_mixers_own_arguments(arguments, code, names, conv_size):
    mixer = HGRN2Mixer(16, 8, conv_size=conv_size)
    arguments = {"x": X, "lower_bound": BOUND} | arguments
    if conv_size and isinstance(state := arguments.get("state"), dict) and state:
        arguments["state"] = mixer.init_state(2) | state
    with refuses(code, *names) as caught:
        mixer(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("conv_size", [0, 4])
def test_a_mask_of_numbers_is_a_mask(conv_size):
    torch.manual_seed(0)
    mixer, mask = HGRN2Mixer(16, 8, conv_size=conv_size), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    x = torch.randn(2, 4, 16)
    assert torch.equal(mixer(x, mask=mask)[0], mixer(x, mask=mask.bool())[0])


def test_a_state_from_the_start_is_no_state():
    torch.manual_seed(0)
    mixer, x = HGRN2Mixer(16, 8, conv_size=3), torch.randn(2, 4, 16)
    assert torch.equal(mixer(x, state=mixer.init_state(2))[0], mixer(x)[0])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert mixer.init_state(2)["recurrent"].dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
    assert mixer.double().init_state(2)["recurrent"].dtype == torch.float64


@pytest.mark.parametrize("floor", [0, 0.5, float("nan"), -70, "-3"])
def test_a_floor_that_is_none_is_refused(floor):
    with refuses("invalid-value", "min_log_decay"):
        HGRN2Mixer(16, 8, min_log_decay=floor)


@pytest.mark.slow
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


@pytest.mark.parametrize("conv_size", [0, 3])
def test_its_three_acts_are_the_mixer(conv_size):
    torch.manual_seed(0)
    mixer, x, context = HGRN2Mixer(32, 16, conv_size=conv_size), torch.randn(2, 9, 32), Context()
    q, z, v = mixer.project(x, None, context).inputs
    y, state = mixer.mix((q, z, v), None, context)
    wanted, new = mixer(x)
    assert torch.equal(mixer.finish(y), wanted)
    assert torch.equal(state["recurrent"], new["recurrent"])
    # from the last token to the first: the mixed tokens of the sequence turned round
    backward, _ = mixer.mix((q, z, v), None, context, reverse=True)
    turned, _ = mixer.mix((q.flip(1), z.flip(1), v.flip(1)), None, context)
    torch.testing.assert_close(backward, turned.flip(1))
    assert not torch.allclose(backward, y)


def test_a_context_moves_with_its_tensors():
    earlier = ({"k": torch.ones(2)},)
    context = Context(torch.tensor([0, 3]), None, False, True, torch.zeros(4), earlier, (2, 3), "reverse", "rows").to(
        "meta"
    )
    assert (context.mask, context.keep_state, context.is_step) == (None, False, True)
    assert (context.grid, context.order, context.axis) == ((2, 3), "reverse", "rows")
    assert all(x.is_meta for x in (context.cu_seqlens, context.lower_bound, context.earlier[0]["k"]))
