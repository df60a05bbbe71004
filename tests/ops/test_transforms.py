"""Operators under transforms of torch.func against loops: vmap over every input, values and gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.func import grad, vmap

from hgrn2.ops import gated_scan, hgrn2_scan, hgrn2_step, linear_scan, selective_scan
from hgrn2.ops.backends import registered
from tests.ops.double_backend import DoubleBackend
from tests.refusals import refuses

BACKENDS = ["chunked", "reference"]
SAMPLES = 3
# torch warns where it has no rule for vmap
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error:There is a performance drop:UserWarning")]


def tied(backend, q, f, v, lower_bound, initial_state):
    return hgrn2_scan(q, f, v, lower_bound, initial_state=initial_state, min_log_decay=-3, backend=backend)


def packed(backend, q, f, v, lower_bound, initial_state):
    bounds = torch.tensor([0, 2, 5])
    return hgrn2_scan(q[:1], f[:1], v[:1], lower_bound, initial_state=initial_state, cu_seqlens=bounds, backend=backend)


def free(backend, q, k, v, log_f, initial_state):
    return gated_scan(q, k, v, log_f, initial_state=initial_state, backend=backend)


def step(backend, q, f, v, lower_bound, state):
    return hgrn2_step(q[:, 0], f[:, 0], v[:, 0], state, lower_bound, backend=backend)


def elements(backend, a, b, initial_state):
    return linear_scan(a, b, initial_state=initial_state, backend="steps" if backend == "chunked" else backend)


def selective(backend, u, dt, a, b, c, initial_state):
    del backend
    return selective_scan(u, dt, a, b, c, initial_state=initial_state)


FUNCTIONS = {function.__name__: function for function in (tied, packed, free, step, elements, selective)}


def operands(name):
    """The inputs of a function, each with a first axis of samples."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(SAMPLES, *shape, generator=generator, dtype=torch.float64)

    if name == "elements":
        return [normal(2, 5, 4).sigmoid(), normal(2, 5, 4), normal(2, 4)]
    if name == "selective":
        rows = [normal(2, 5, 3) for _ in range(2)]
        return [rows[0], rows[1].abs(), -normal(3, 4).abs(), normal(2, 5, 4), normal(2, 5, 4), normal(2, 3, 4)]
    q, f, v = normal(2, 5, 2, 4), normal(2, 5, 2, 4), normal(2, 5, 2, 3)
    gate = -normal(2, 5, 2, 4).abs() if name == "free" else normal(2, 4).sigmoid()
    return [q, f, v, gate, normal(2, 2, 4, 3)]


def choices(name):
    """Inputs that vmap maps over: each alone, and all together."""
    count = len(operands(name))
    return [tuple(j == i for j in range(count)) for i in range(count)] + [(True,) * count]


CASES = [(name, chosen) for name in FUNCTIONS for chosen in choices(name)]
cases = pytest.mark.parametrize(
    ("name", "chosen"), CASES, ids=[f"{name}-{''.join('01'[x] for x in chosen)}" for name, chosen in CASES]
)


def loss(function, *inputs):
    y, state = function(*inputs)
    return y.square().sum() + (state * state.cos()).sum()


def mapped(function, inputs, chosen):
    """The results of vmap and of a loop."""
    inputs = [x if on else x[0] for x, on in zip(inputs, chosen, strict=True)]
    found = vmap(function, tuple(0 if on else None for on in chosen))(*inputs)
    each = [function(*(x[i] if on else x for x, on in zip(inputs, chosen, strict=True))) for i in range(SAMPLES)]
    return found, tuple(map(torch.stack, zip(*each, strict=True)))


@pytest.mark.parametrize("backend", BACKENDS)
@cases
def test_vmap_gives_what_a_loop_gives(name, chosen, backend):
    found, wanted = mapped(partial(FUNCTIONS[name], backend), operands(name), chosen)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@cases
def test_gradients_for_each_sample_are_those_of_a_loop(name, chosen, backend):
    inputs = operands(name)
    gradients = grad(partial(loss, partial(FUNCTIONS[name], backend)), argnums=tuple(range(len(inputs))))
    found, wanted = mapped(gradients, inputs, chosen)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_through_vmap_are_those_of_a_loop(name, backend):
    one, samples = partial(loss, partial(FUNCTIONS[name], backend)), zip(*operands(name), strict=True)
    wanted = [torch.stack(some) for some in zip(*(grad(one, tuple(range(len(x))))(*x) for x in samples), strict=True)]
    # inside torch.func.grad, and with a tape of autograd outside
    inputs = operands(name)
    found = grad(lambda *x: vmap(one)(*x).sum(), argnums=tuple(range(len(inputs))))(*inputs)
    torch.testing.assert_close(list(found), wanted)
    leaves = [x.requires_grad_() for x in operands(name)]
    torch.testing.assert_close(list(torch.autograd.grad(vmap(one)(*leaves).sum(), leaves)), wanted)


def test_vmap_inside_vmap():
    q, f, v, bound, state = operands("tied")
    run = partial(tied, "chunked")
    found, _ = vmap(vmap(run, (0, None, None, None, None)), (None, 0, 0, 0, 0))(q, f, v, bound, state)
    torch.testing.assert_close(found[1, 2], run(q[2], f[1], v[1], bound[1], state[1])[0])


@pytest.mark.parametrize("is_opaque", [False, True], ids=["plain", "opaque"])
def test_steps_of_every_kind_of_backend(is_opaque):
    q, f, v, bound, state = (x.float() for x in operands("step"))
    backend = DoubleBackend()
    backend.opaque = ("scan", "step") if is_opaque else ("scan",)
    run, every = partial(step, "double"), (True,) * 5
    with registered(backend):
        found, wanted = mapped(run, [q, f, v, bound, state], every)
        torch.testing.assert_close(found, wanted)
        found, wanted = mapped(grad(partial(loss, run), argnums=(0, 1, 2, 3, 4)), [q, f, v, bound, state], every)
        torch.testing.assert_close(found, wanted)
        # through vmap, which hides that a gradient is recorded
        leaf = q.clone().requires_grad_()
        (through,) = torch.autograd.grad(vmap(partial(loss, run))(leaf, f, v, bound, state).sum(), leaf)
        torch.testing.assert_close(through, found[0])


@pytest.mark.parametrize("is_opaque", [False, True], ids=["plain", "opaque"])
def test_steps_in_place_change_the_states_of_all_samples(is_opaque):
    q, f, v, bound, state = (x.float() for x in operands("step"))
    backend = DoubleBackend()
    backend.opaque = ("scan", "step") if is_opaque else ("scan",)

    def run(q, f, v, bound, state):
        return hgrn2_step(q[:, 0], f[:, 0], v[:, 0], state, bound, inplace=True, backend="double")[0]

    wanted = vmap(partial(step, "chunked"))(q, f, v, bound, state)
    with registered(backend):
        changed = state.clone()
        torch.testing.assert_close(vmap(run)(q, f, v, bound, changed), wanted[0])
        torch.testing.assert_close(changed, wanted[1])
        if is_opaque:
            with refuses("unsupported", "inplace"):
                vmap(run, (0, 0, 0, 0, None))(q, f, v, bound, state[0])


def test_a_step_in_place_where_vmap_hides_a_gradient_is_refused():
    q, f, v, _, state = operands("step")
    with refuses("contradiction", "no_grad"):
        vmap(lambda q, s: hgrn2_step(q[:, 0], f[0, :, 0], v[0, :, 0], s, inplace=True))(q.requires_grad_(), state)


def test_vmap_over_the_bounds_of_packed_sequences():
    q, f, v, *_ = (x[0, :1] for x in operands("tied"))
    bounds = torch.tensor([[0, 2, 5], [0, 0, 5], [0, 4, 5]])
    found = vmap(lambda x: hgrn2_scan(q, f, v, cu_seqlens=x, backend="chunked"))(bounds)
    wanted = [hgrn2_scan(q, f, v, cu_seqlens=x, backend="chunked") for x in bounds]
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*wanted, strict=True))))
    with refuses("invalid-value", "cu_seqlens", "[0, 7, 5]"):
        vmap(lambda x: hgrn2_scan(q, f, v, cu_seqlens=x, backend="chunked"))(torch.tensor([[0, 7, 5]]))
    with refuses("unsupported", "cu_seqlens", "vmap"):
        vmap(lambda x: hgrn2_scan(q, f, v, cu_seqlens=x, backend="reference"))(bounds)


def test_values_are_checked_under_a_gradient_but_not_under_vmap():
    q, f, v, bound, _ = operands("tied")
    high = bound + 1
    with refuses("invalid-value", "lower_bound"):
        grad(lambda x: hgrn2_scan(q[0], f[0], v[0], x)[0].sum())(high[0])
    vmap(lambda x: hgrn2_scan(q[0], f[0], v[0], x)[0])(high)
    with refuses("invalid-value", "lower_bound"):
        vmap(lambda x: hgrn2_scan(x, f[0], v[0], high[0])[0])(q)


@pytest.mark.parametrize("transform", [torch.func.hessian, torch.func.jacfwd])
def test_linear_scan_says_which_derivatives_it_lacks(transform):
    a, b, state = (x[0] for x in operands("elements"))
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        transform(lambda x: linear_scan(x, b, initial_state=state, backend="steps")[0].square().sum())(a)
    transform(lambda x: linear_scan(x, b, initial_state=state, backend="reference")[0].square().sum())(a)


@pytest.mark.parametrize(("name", "message"), [("elements", "backend='reference'"), ("selective", "selective_scan")])
def test_operators_without_a_second_derivative_say_so(name, message):
    inputs = [x[0].requires_grad_() for x in operands(name)]
    (gradient,) = torch.autograd.grad(loss(FUNCTIONS[name], "chunked", *inputs), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        gradient.sum().backward()
