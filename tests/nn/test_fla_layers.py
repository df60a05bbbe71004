"""HGRN, GLA, RWKV-6 and ReBased beside fla's layers with copied weights.

fla's kernels need a GPU. On a CPU its layers run with its own plain loops, and torch's norms, in their places.
"""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hgrn2.nn.mixers import Context, find_mixer
from tests.formats.installed_fla import import_fla
from tests.numerics import relative_error

D, T, RANK = 32, 20, 4
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])


class GatedNorm(nn.Module):
    """RMSNorm times SiLU of a gate, in place of fla's fused one."""

    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight

    def forward(self, x, gate):
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-5) * F.silu(gate)


def tune_nothing(monkeypatch):
    """Leave fla's kernels their first block sizes; compiling all of them takes minutes."""
    from triton.runtime.autotuner import Autotuner

    tuners = []
    for module in [module for name, module in sys.modules.items() if name.startswith("fla.")]:
        for value in list(vars(module).values()):
            # heuristics may lie around it
            while hasattr(value, "fn") and not isinstance(value, Autotuner):
                value = value.fn
            if isinstance(value, Autotuner):
                tuners.append(value)
    for tuner in tuners:
        monkeypatch.setattr(tuner, "configs", tuner.configs[:1])
    assert tuners


def layer_of(module, name, monkeypatch, device, substitutes, **settings):
    """A layer of fla with random parameters; on a CPU, with `substitutes` for functions of its module."""
    import_fla()
    found = importlib.import_module(f"fla.layers.{module}")
    if device == "cpu":
        for key, value in substitutes.items():
            monkeypatch.setattr(found, key, value)
    else:
        tune_nothing(monkeypatch)
    torch.manual_seed(0)
    layer = getattr(found, name)(hidden_size=D, **settings)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape) + (parameter.dim() == 1))
    return layer


def naive(path, name):
    import_fla()
    return getattr(importlib.import_module(f"fla.ops.{path}"), name)


def assert_same(mixer, theirs, device, weights, bound=None, **call):
    """Check equal outputs and gradients of x from a mixer with these weights and from fla's layer."""
    mixer.load_state_dict({name: value.detach().clone() for name, value in weights.items()})
    mixer, theirs = mixer.to(device), theirs.to(device)
    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(1)).to(device)
    dy = torch.randn(2, T, D, generator=torch.Generator().manual_seed(2)).to(device)
    results = []
    for run in (lambda x: mixer(x, None, Context(lower_bound=bound))[0], lambda x: theirs(x, **call)):
        own = x.clone().requires_grad_()
        y = run(own)
        y = y[0] if isinstance(y, tuple) else y
        results.append((y.detach(), torch.autograd.grad((y * dy).sum(), own)[0]))
    # fla's kernels multiply in tf32, and its ReBased adds 1e-6 to sums of weights
    limit = 2e-4 if device == "cpu" else 2e-2
    for found, wanted in zip(*results, strict=True):
        assert relative_error(found, wanted.double()).rms < limit


def build(name, **options):
    found = find_mixer(name)
    return found.build(D, found.options(**options))


def linears(layer, names):
    return {f"{own}.weight": getattr(layer, theirs).weight for own, theirs in names.items()}


@devices
def test_hgrn1(device, monkeypatch):
    loop = naive("hgrn.naive", "naive_recurrent_hgrn")

    def recurrence(x, g, initial_state, output_final_state, **_):
        return loop(x, g, initial_state, output_final_state)

    substitutes = {"chunk_hgrn": recurrence, "fused_recurrent_hgrn": recurrence, "swiglu": lambda x, y: F.silu(x) * y}
    theirs = layer_of("hgrn", "HGRNAttention", monkeypatch, device, substitutes, layer_idx=1)
    bound = torch.linspace(0.1, 0.9, D, device=device)
    weights = linears(theirs, {name: name for name in ("i_proj", "f_proj", "g_proj", "o_proj", "g_norm")})
    if device == "cpu":
        theirs.g_norm = GatedNorm(theirs.g_norm)
    assert_same(build("hgrn1", form="real"), theirs, device, weights, bound, lower_bound=bound)


@devices
def test_gla(device, monkeypatch):
    loop = naive("gla.naive", "naive_recurrent_gla")

    def recurrence(q, k, v, gk, initial_state, output_final_state, **_):
        return loop(q, k, v, gk, initial_state, output_final_state)

    substitutes = {"fused_recurrent_gla": recurrence}
    theirs = layer_of(
        "gla", "GatedLinearAttention", monkeypatch, device, substitutes, num_heads=2, gate_low_rank_dim=RANK
    )
    own = {name: name for name in ("q_proj", "k_proj", "v_proj", "o_proj")} | {"gate_proj": "g_proj"}
    weights = linears(theirs, own | {"g_norm": "g_norm_swish_gate"})
    weights |= {f"f_proj.{name}": x for name, x in theirs.gk_proj.named_parameters()}
    if device == "cpu":
        theirs.g_norm_swish_gate = GatedNorm(theirs.g_norm_swish_gate)
    assert_same(build("gla", num_heads=2, gate_rank=RANK), theirs, device, weights)


@devices
def test_rwkv6(device, monkeypatch):
    loop = naive("rwkv6.recurrent_naive", "naive_recurrent_rwkv6")

    def recurrence(r, k, v, w, u, scale, initial_state, output_final_state, **_):
        parts = (part.transpose(1, 2) for part in (r, k, v, w))
        y, end = loop(*parts, u, scale, initial_state, output_final_state)
        return y.transpose(1, 2), end

    def shift(x, _):
        return F.pad(x, (0, 0, 1, -1)) - x

    heads = 4
    theirs = layer_of(
        "rwkv6", "RWKV6Attention", monkeypatch, device, {"fused_recurrent_rwkv6": recurrence, "token_shift": shift},
        expand_k=1.0, num_heads=heads, proj_low_rank_dim=RANK, gate_low_rank_dim=RANK + 1, norm_eps=64e-5,
    )  # fmt: skip
    # inputs in fla's order, r w k v g, and here, w k v r g
    order = [1, 2, 3, 0, 4]
    down = theirs.x_proj[0].linear.weight.T.unflatten(1, (5, RANK))
    up = theirs.x_proj[2].weight.view(D, 5, RANK).permute(1, 2, 0)
    low_rank = theirs.w_proj.linear.lora
    weights = {f"{name}_proj.weight": getattr(theirs, f"{name}_proj").linear.weight for name in "rkvg"}
    weights |= {
        "o_proj.weight": theirs.o_proj.weight, "bonus": theirs.bonus.flatten(), "decay": low_rank[2].bias,
        "decay_down": low_rank[0].weight.T, "decay_up": low_rank[2].weight.T, "mix_x": theirs.x_proj[0].mu,
        "mix": theirs.x_bias[order], "mix_down": down[:, order].flatten(1), "mix_up": up[order],
        "norm_weight": theirs.g_norm.weight, "norm_bias": theirs.g_norm.bias,
    }  # fmt: skip
    if device == "cpu":
        weight, bias = theirs.g_norm.weight, theirs.g_norm.bias
        theirs.gate_fn, theirs.g_norm = F.silu, nn.Module()
        theirs.g_norm.forward = lambda x: F.group_norm(x.flatten(0, 1), heads, weight, bias, 64e-5).view_as(x)
    mixer = build("rwkv6", head_size=D // heads, mix_rank=RANK, decay_rank=RANK + 1)
    assert_same(mixer, theirs, device, weights)


@devices
def test_rebased_of_one_head(device, monkeypatch):
    """With one head the norm over all heads, the authors', is fla's norm over each."""
    loop = naive("rebased.naive", "naive_parallel_rebased")

    def attention(q, k, v, **_):
        return loop(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)

    theirs = layer_of(
        "rebased", "ReBasedLinearAttention", monkeypatch, device, {"parallel_rebased": attention},
        feature_dim=8, num_key_value_heads=1, num_heads=1,
    )  # fmt: skip
    if device == "cpu":
        module = importlib.import_module("fla.modules.feature_map")
        monkeypatch.setattr(module, "layer_norm", lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias))
    weights = linears(theirs, {name: name for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    for name in "qk":
        weights[f"{name}_norm.weight"] = theirs.feature_map.gamma
        weights[f"{name}_norm.bias"] = theirs.feature_map.beta
    assert_same(build("rebased", num_heads=1, feature_dim=8), theirs, device, weights)
