"""Directions on a GPU: every direction in bfloat16 and float32 against the chunked form in float64 on the CPU."""

import pytest
import torch

from hgrn2 import HGRN2Mixer
from hgrn2.nn.mixers import DIRECTIONS, Context, find_mixer
from hgrn2.nn.parameters import InitialValues
from tests.numerics import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIONS = {
    "hgrn2": {"expand_ratio": 128}, "hgrn2-narrow": {"expand_ratio": 2, "v_activation": "silu"},
    "hgrn1-real": {"form": "real"}, "hgrn1-complex": {"form": "complex"}, "mamba": {}, "griffin": {"num_blocks": 2},
    "gla": {"num_heads": 2}, "attention": {"num_heads": 2},
}  # fmt: skip


def make(name, direction):
    found = find_mixer(name.split("-")[0])
    mixer = found.build(256, found.options(**OPTIONS[name]), direction=direction)
    mixer.reset_parameters(InitialValues(0.06, 0, 2, torch.Generator().manual_seed(1)))
    return mixer


def results(mixer, x, bound, mask, grid):
    x, bound = x.detach().requires_grad_(), bound.detach().requires_grad_()
    own = bound if mixer.uses_lower_bound else None
    y, _ = mixer(x, None, Context(mask=mask, keep_state=False, lower_bound=own, grid=grid))
    y = y * mask.unsqueeze(-1)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).bfloat16().to(y)
    inputs = {"x": x, "bound": bound} | dict(mixer.named_parameters())
    found = torch.autograd.grad((y * weights).sum(), list(inputs.values()), allow_unused=True, materialize_grads=True)
    return {"y": y.detach()} | {f"d_{key}": grad for key, grad in zip(inputs, found, strict=True)}


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        *(("hgrn2", direction) for direction in DIRECTIONS),
        *((name, direction) for name in OPTIONS if name != "hgrn2" for direction in ("bidirectional", "2d")),
    ],
)
def test_every_direction_in_float32_is_the_one_in_float64(name, direction):
    torch.manual_seed(0)
    grid = (9, 14)
    x, bound = torch.randn(2, 126, 256), torch.rand(256).mul(0.9)
    mask = torch.rand(2, 126) < 0.8
    mixer = make(name, direction)
    exact = results(make(name, direction).double(), x.double(), bound.double(), mask, grid)
    found = results(mixer.cuda(), x.cuda(), bound.cuda(), mask.cuda(), grid)
    for key, wanted in exact.items():
        # products of float32 in torch may be of TF32 only if asked for
        assert relative_error(found[key].cpu(), wanted).rms <= 5e-5, key


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("head", [2, 128])
def test_in_bfloat16_it_is_as_exact_as_the_causal_mixer(head, direction):
    torch.manual_seed(0)
    grid, shape = (14, 14), (4, 196, 256)
    x, bound = torch.randn(shape).bfloat16(), torch.rand(256).mul(0.9)
    mask = torch.ones(shape[:2], dtype=torch.bool)
    errors = {}
    for kind in {"causal", direction}:
        torch.manual_seed(1)
        mixer = HGRN2Mixer(256, head, direction=kind).bfloat16()

        def call(mixer, device, dtype):
            leaf = x.to(device, dtype, copy=True).requires_grad_()
            y, _ = mixer(
                leaf, bound.to(device, torch.promote_types(dtype, torch.float32)), mask=mask.to(device), grid=grid
            )
            (y.square().sum()).backward()
            return y.detach().cpu(), leaf.grad.cpu()

        found = call(mixer.cuda(), "cuda", torch.bfloat16)
        exact = call(mixer.cpu().double(), "cpu", torch.float64)
        errors[kind] = [relative_error(a, b).rms for a, b in zip(found, exact, strict=True)]
    for ours, causal in zip(errors[direction], errors["causal"], strict=True):
        assert ours <= 3 * causal, errors


# matrices are multiplied in float32, as in eager mode
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_a_compiled_bidirectional_mixer_is_the_eager_one():
    torch.manual_seed(0)
    mixer = HGRN2Mixer(256, 128, direction="2d").cuda()
    x, mask = torch.randn(2, 196, 256, device="cuda"), torch.rand(2, 196, device="cuda") < 0.8

    def call(x):
        return mixer(x, mask=mask, grid=(14, 14), keep_state=False)[0]

    outputs = [f(x) for f in (torch.compile(call, fullgraph=True), call)]
    assert relative_error(*(y * mask.unsqueeze(-1) for y in outputs)).rms < 1e-4
