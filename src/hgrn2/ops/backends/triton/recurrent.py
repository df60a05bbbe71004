"""One token of the recurrence: the state is read once and written once."""

import triton
import triton.language as tl

from hgrn2.ops.backends.triton.chunks import activate, sigmoids


@triton.jit
def step_kernel(
    q_p, f_p, v_p, state_p, bound_p, y_p, new_state_p, q_batch, q_head, f_batch, f_head, v_batch, v_head,
    HEADS, K, V, scale,
    BK: tl.constexpr, BV: tl.constexpr, HAS_BOUND: tl.constexpr, Q_ACTIVATION: tl.constexpr,
    V_ACTIVATION: tl.constexpr,
):  # fmt: skip
    """S = Diag(f) S + k v^T, y = S^T q for one head and BV columns. Programs: (batch * HEADS, blocks of V)."""
    i_state, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_batch, i_head = i_state // HEADS, i_state % HEADS
    k_columns, v_columns = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    k_inside, v_inside = k_columns < K, v_columns < V
    places = i_state * K * V + k_columns[:, None] * V + v_columns[None, :]
    inside = k_inside[:, None] & v_inside[None, :]
    state = tl.load(state_p + places, mask=inside, other=0.0)
    q = tl.load(q_p + i_batch * q_batch + i_head * q_head + k_columns, mask=k_inside, other=0.0).to(tl.float32)
    z = tl.load(f_p + i_batch * f_batch + i_head * f_head + k_columns, mask=k_inside, other=0.0).to(tl.float32)
    v = tl.load(v_p + i_batch * v_batch + i_head * v_head + v_columns, mask=v_inside, other=0.0).to(tl.float32)
    f, k = sigmoids(z)
    if HAS_BOUND:
        beta = tl.load(bound_p + i_head * K + k_columns, mask=k_inside, other=0.0)
        f = beta + (1.0 - beta) * f
        k = (1.0 - beta) * k
    q = tl.where(k_inside, activate(q, Q_ACTIVATION) * scale, 0.0)
    v = activate(v, V_ACTIVATION)
    update = k[:, None] * v[None, :]
    # a state that hardly decays is not rounded in a product with a number near 1
    state = tl.where(k[:, None] < 0.5, state - k[:, None] * state, f[:, None] * state) + update
    tl.store(new_state_p + places, state, mask=inside)
    y = tl.sum(q[:, None] * state, axis=0)
    tl.store(y_p + i_state * V + v_columns, y.to(y_p.dtype.element_ty), mask=v_inside)
