"""The oracle against pencil and paper, the formulas of the paper, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hgrn2.ops import gated_scan, hgrn2_scan
from hgrn2.ops.backends.reference import recurrence, tied_gate

# one head, K = V = 1, three tokens; z = 0 gives sigmoid 1/2
Q = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(1, 3, 1, 1)
V = torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64).view(1, 3, 1, 1)
Z = torch.zeros_like(Q)


def scan(**changes) -> tuple[list[float], list[float]]:
    arguments = {"q": Q, "f": Z, "v": V, "q_activation": "none", "backend": "reference"} | changes
    y, state = hgrn2_scan(**arguments)
    return y.flatten().tolist(), state.flatten().tolist()


def test_tied_gate_by_hand():
    # f = k = 1/2: S = 1/2*0 + 1/2*2 = 1, 1/2 + 2 = 2.5, 1.25 + 4 = 5.25; y = 1*1, 2*2.5, 3*5.25
    assert scan() == ([1.0, 5.0, 15.75], [5.25])


def test_lower_bound_by_hand():
    # f = 1/2 + 1/2*1/2 = 3/4, k = 1/4: S = 0.5, 0.375 + 1 = 1.375, 1.03125 + 2 = 3.03125
    bound = torch.full((1, 1), 0.5, dtype=torch.float64)
    assert scan(lower_bound=bound) == ([0.5, 2.75, 9.09375], [3.03125])


def test_floor_by_hand():
    # f = k = 1/2, but the decay is 3/4: S = 1, 0.75 + 2 = 2.75, 2.0625 + 4 = 6.0625; y = 1*1, 2*2.75, 3*6.0625
    assert scan(min_log_decay=math.log(0.75)) == ([1.0, 5.5, 18.1875], [6.0625])
    # a floor below the gate changes nothing
    assert scan(min_log_decay=math.log(0.25)) == scan()


def test_the_gradient_where_a_floor_holds_is_the_key_s_alone():
    # S = ((k1 v1) d + k2 v2) d + k3 v3, with dk = -1/4 dz at z = 0: by hand, for the last state
    z = Z.clone().requires_grad_()
    _, state = hgrn2_scan(Q, z, V, min_log_decay=math.log(0.75), backend="reference")
    state.sum().backward()
    assert z.grad is not None
    assert z.grad.flatten().tolist() == pytest.approx([-2 * 0.75**2 / 4, -4 * 0.75 / 4, -8 / 4], rel=1e-15)


def test_reverse_by_hand():
    # from the last token: S = 4, 2 + 2 = 4, 2 + 1 = 3; y = 1*3, 2*4, 3*4
    assert scan(reverse=True) == ([3.0, 8.0, 12.0], [3.0])


def test_packed_by_hand():
    # sequences {1}, {}, {2, 3}: S = 1 | 2, 1 + 4 = 5; an empty sequence keeps its state
    starts = torch.tensor([0.0, 7.0, 0.0], dtype=torch.float64).view(3, 1, 1, 1)
    cu_seqlens = torch.tensor([0, 1, 1, 3])
    assert scan(cu_seqlens=cu_seqlens, initial_state=starts) == ([1.0, 4.0, 15.0], [1.0, 7.0, 5.0])
    # each sequence reversed on its own: 1 | 4, 2 + 2 = 4
    assert scan(cu_seqlens=cu_seqlens, initial_state=starts, reverse=True) == ([1.0, 8.0, 12.0], [1.0, 7.0, 4.0])


def test_initial_state_and_scale_by_hand():
    # S = 1/2*8 + 1 = 5, 2.5 + 2 = 4.5, 2.25 + 4 = 6.25; y = 10 S q; the state is not scaled
    start = torch.full((1, 1, 1, 1), 8.0, dtype=torch.float64)
    assert scan(initial_state=start, scale=10.0) == ([50.0, 90.0, 187.5], [6.25])


def test_activations_by_hand():
    # sigmoid(0) = 1/2, silu(0) = 0, silu(ln 3) = ln 3 * 3/4; one token, f = k = 1/2
    log3 = math.log(3)
    one = torch.full((1, 1, 1, 1), log3, dtype=torch.float64)
    zero = torch.zeros_like(one)
    assert scan(q=zero, f=zero, v=V[:, 2:], q_activation="sigmoid") == ([2.0], [4.0])
    assert scan(q=zero, f=zero, v=V[:, 2:], q_activation="silu") == ([0.0], [4.0])
    y, _ = scan(q=one, f=zero, v=V[:, 2:], q_activation="silu")
    assert y == pytest.approx([0.75 * log3 * 4], rel=1e-15)
    y, state = scan(q=Q[:, :1], f=zero, v=one, v_activation="silu")
    assert y == state == pytest.approx([0.75 * log3 / 2], rel=1e-15)


def test_state_orientation_by_hand():
    # K = V = 2. f = sigmoid([0, ln 3]) = [1/2, 3/4], k = [1/2, 1/4], v = [4, 8], S0 = [[1, 2], [3, 4]]
    # S = [[0.5 + 2, 1 + 4], [2.25 + 1, 3 + 2]] = [[2.5, 5], [3.25, 5]]; y = [1, 10] S = [35, 55]
    def row(a, b):
        return torch.tensor([a, b], dtype=torch.float64).view(1, 1, 1, 2)

    start = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64).view(1, 1, 2, 2)
    y, state = scan(q=row(1, 10), f=row(0, math.log(3)), v=row(4, 8), initial_state=start)
    assert y == pytest.approx([35, 55], rel=1e-15)
    assert state == pytest.approx([2.5, 5, 3.25, 5], rel=1e-15)


def test_untied_key_by_hand():
    # f = 1/2, k = 3: S = 6, 3 + 12 = 15, 7.5 + 24 = 31.5; and f = 0 forgets all: S = 24 at the end
    log_f = torch.full_like(Q, math.log(0.5))
    y, state = gated_scan(Q, torch.full_like(Q, 3), V, log_f, backend="reference")
    assert y.flatten().tolist() == pytest.approx([6, 30, 94.5], rel=1e-15)
    assert state.item() == pytest.approx(31.5, rel=1e-15)
    log_f[:, 2] = -math.inf
    _, state = gated_scan(Q, torch.full_like(Q, 3), V, log_f, backend="reference")
    assert state.item() == 24


def test_heads_and_batch_are_independent():
    generator = torch.Generator().manual_seed(0)
    q, f, v = torch.randn(3, 2, 7, 3, 4, generator=generator, dtype=torch.float64)
    y, state = hgrn2_scan(q, f, v, backend="reference")
    for b in range(2):
        for h in range(3):
            part = [x[b : b + 1, :, h : h + 1] for x in (q, f, v)]
            alone, alone_state = hgrn2_scan(*part, backend="reference")
            torch.testing.assert_close(y[b : b + 1, :, h : h + 1], alone, rtol=1e-14, atol=0)
            torch.testing.assert_close(state[b : b + 1, h : h + 1], alone_state, rtol=1e-14, atol=0)


def gate_grid() -> tuple[Tensor, Tensor]:
    z = torch.tensor([-700.0, -30.0, -5.0, 0.0, 5.0, 14.0, 30.0, 700.0], dtype=torch.float64)
    bound = torch.tensor([0.0, 0.5, 0.999, 0.9999], dtype=torch.float64)
    z, bound = torch.meshgrid(z, bound, indexing="ij")
    return z[:, None].contiguous(), bound[:, None].contiguous()


def test_gate_and_key_identities():
    z, bound = gate_grid()
    f, k = tied_gate(z, bound)
    sigmoid, complement = 1 / (1 + torch.exp(-z)), 1 / (1 + torch.exp(z))
    torch.testing.assert_close(f, bound + (1 - bound) * sigmoid, rtol=1e-15, atol=0)
    # the key keeps its digits where 1 - f would have none
    torch.testing.assert_close(k, (1 - bound) * complement, rtol=1e-14, atol=0)
    log_f = torch.logaddexp(torch.log(bound), torch.log1p(-bound) + torch.nn.functional.logsigmoid(z))
    torch.testing.assert_close(torch.log(f), log_f, rtol=1e-13, atol=1e-15)


def test_gate_derivatives():
    z, bound = gate_grid()
    z.requires_grad_()
    bound.requires_grad_()
    f, k = tied_gate(z, bound)
    sigmoid, complement = (1 / (1 + torch.exp(-x.detach())) for x in (z, -z))
    slope = (1 - bound.detach()) * sigmoid * complement
    df_dz, df_dbound = torch.autograd.grad(f.sum(), (z, bound), retain_graph=True)
    dk_dz, dk_dbound = torch.autograd.grad(k.sum(), (z, bound))
    # a bound near 1 costs the oracle a few of its digits, which are more than anyone needs
    torch.testing.assert_close(df_dz, slope, rtol=1e-11, atol=1e-300)
    torch.testing.assert_close(dk_dz, -slope, rtol=1e-11, atol=1e-300)
    torch.testing.assert_close(df_dbound, complement, rtol=1e-14, atol=1e-300)
    torch.testing.assert_close(dk_dbound, -complement, rtol=1e-14, atol=1e-300)


def test_gradient_follows_the_formulas():
    """G_t = Diag(f_{t+1}) G_{t+1} + scale q_t dy_t^T and what follows from it, one head, written out."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    length, scale = 6, 0.7
    q, k, v, dy = normal(length, 3), normal(length, 3), normal(length, 4), normal(length, 4)
    f, start, d_final = torch.sigmoid(normal(length, 3)), normal(3, 4), normal(3, 4)
    states = [start]
    for t in range(length):
        states.append(f[t, :, None] * states[-1] + torch.outer(k[t], v[t]))
    wanted: dict[str, list[Tensor]] = {"q": [], "k": [], "v": [], "f": []}
    g = d_final
    for t in reversed(range(length)):
        g = g + scale * torch.outer(q[t], dy[t])
        wanted["q"].insert(0, scale * states[t + 1] @ dy[t])
        wanted["k"].insert(0, g @ v[t])
        wanted["v"].insert(0, g.T @ k[t])
        wanted["f"].insert(0, (g * states[t]).sum(1))
        g = f[t, :, None] * g
    leaves = {name: x[None, :, None].clone().requires_grad_() for name, x in zip("qkvf", (q, k, v, f), strict=True)}
    first = start[None, None].clone().requires_grad_()
    y, final = recurrence(**leaves, state=first, cu_seqlens=None, reverse=False, scale=scale)
    grads = torch.autograd.grad((y, final), (*leaves.values(), first), (dy[None, :, None], d_final[None, None]))
    for name, grad in zip(leaves, grads, strict=False):
        torch.testing.assert_close(grad[0, :, 0], torch.stack(wanted[name]), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(grads[-1][0, 0], g, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("activations", [("silu", "none"), ("sigmoid", "silu"), ("none", "none")])
@pytest.mark.parametrize("min_log_decay", [None, -0.5])
def test_gradcheck(activations, min_log_decay):
    generator = torch.Generator().manual_seed(2)
    q, f, v = (torch.randn(1, 5, 1, 2, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    bound = torch.tensor([[0.1, 0.6]], dtype=torch.float64, requires_grad=True)
    start = torch.randn(1, 1, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()

    def op(q, f, v, bound, start):
        return hgrn2_scan(
            q, f, v, bound, initial_state=start, scale=0.5, backend="reference",
            q_activation=activations[0], v_activation=activations[1], min_log_decay=min_log_decay,
        )  # fmt: skip

    held = tied_gate(f, bound)[0] < math.exp(-0.5)
    assert held.any()
    assert not held.all()
    assert torch.autograd.gradcheck(op, (q, f, v, bound, start))
