"""Mixers once more, from the equations of their papers: plain torch, one token at a time, for one sequence each row.

Each takes the mixer's options, its parameters by name, x [B, T, D], the state before x and the lower bound, and returns
the outputs and the state after x.
"""

import torch
from torch.nn import functional as F


def heads(x, count):
    return x.unflatten(-1, (count, -1))


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def gla(o, p, x, state, bound):
    """arXiv 2312.06635, section 4.4: S_t = diag(a_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t; a_t = sigmoid(.)^(1/16)."""
    S, outputs = state["recurrent"], []
    for t in range(x.shape[1]):
        xt = x[:, t]
        q, k, v = (heads(xt @ p[f"{name}_proj.weight"].T, o.num_heads) for name in "qkv")
        if o.q_activation == "silu":
            q = q * q.sigmoid()
        if o.gate == "low-rank":
            a = (xt @ p["f_proj.0.weight"].T @ p["f_proj.1.weight"].T + p["f_proj.1.bias"]).sigmoid() ** (1 / 16)
        else:
            beta = 0 if bound is None else bound
            a = beta + (1 - beta) * (xt @ p["f_proj.0.weight"].T).sigmoid()
        S = heads(a, o.num_heads)[..., None] * S + k[..., None] * v[..., None, :]
        y = (q[..., None] * S).sum(-2) / q.shape[-1] ** 0.5
        y = y if o.norm_heads else y.flatten(1)
        y = rms_norm(y, p["g_norm.weight"], o.norm_eps)
        y = y.flatten(1) if o.norm_heads else y
        if o.output_gate:
            y = y * F.silu(xt @ p["gate_proj.weight"].T)
        outputs.append(y @ p["o_proj.weight"].T)
    return torch.stack(outputs, 1), {"recurrent": S}
