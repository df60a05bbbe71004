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


def rwkv5(o, p, x, state, bound):
    """arXiv 2404.05892, equations 3 to 8."""
    shares = dict(zip("rkvg", p["mix"], strict=True))

    def mixed(a, b):
        return {name: a + (b - a) * share for name, share in shares.items()}, p["decay"]

    return _rwkv(o, p, x, state, mixed)


def rwkv6(o, p, x, state, bound):
    """arXiv 2404.05892, equations 11 to 16."""
    down = dict(zip("wkvrg", p["mix_down"].chunk(5, 1), strict=True))
    up, shares = dict(zip("wkvrg", p["mix_up"], strict=True)), dict(zip("wkvrg", p["mix"], strict=True))

    def mixed(a, b):
        start = a + (b - a) * p["mix_x"]
        inputs = {name: a + (b - a) * (shares[name] + (start @ down[name]).tanh() @ up[name]) for name in "wkvrg"}
        return inputs, p["decay"] + (inputs["w"] @ p["decay_down"]).tanh() @ p["decay_up"]

    return _rwkv(o, p, x, state, mixed)


def _rwkv(o, p, x, state, mixed):
    before, S, outputs = state["shift"], state["recurrent"], []
    for t in range(x.shape[1]):
        inputs, d = mixed(x[:, t], before)
        r, k, v = (heads(inputs[name] @ p[f"{name}_proj.weight"].T, S.shape[1]) for name in "rkv")
        g = inputs["g"] @ p["g_proj.weight"].T
        kv = k[..., :, None] * v[..., None, :]
        y = (r[..., :, None] * (heads(p["bonus"], S.shape[1])[..., None] * kv + S)).sum(-2)
        S = heads((-d.exp()).exp().expand_as(g), S.shape[1])[..., None] * S + kv
        # the authors divide by 8 before the norm
        y = F.group_norm(y.flatten(1) / 8, S.shape[1], p["norm_weight"], p["norm_bias"], 1e-5)
        outputs.append((y * g * g.sigmoid()) @ p["o_proj.weight"].T)
        before = x[:, t]
    return torch.stack(outputs, 1), {"shift": before, "recurrent": S}


def rebased(o, p, x, state, bound):
    """arXiv 2402.10644, section 4, as attention to all tokens before: no state inside; it is built at the end.

    A carried state enters through phi(x), all K^2 products of two features, made from its pairs.
    """
    q, k = (
        F.layer_norm(
            x @ p[f"{n}_proj.weight"].T, p[f"{n}_norm.weight"].shape, p[f"{n}_norm.weight"], p[f"{n}_norm.bias"]
        )
        for n in "qk"
    )
    q, k, v = (heads(y, o.num_heads).transpose(1, 2) for y in (q, k, x @ p["v_proj.weight"].T))
    weights = ((q @ k.mT) / o.feature_dim**0.5) ** 2 * torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril()
    before = state["recurrent"]
    d = o.feature_dim
    pairs = [(i, j) for i in range(d) for j in range(i, d)]
    numerator, total = weights @ v, weights.sum(-1, keepdim=True)
    end = []
    for n, (i, j) in enumerate(pairs):
        factor = 1 if i == j else 2**0.5
        read = factor * (q[..., i] * q[..., j])[..., None] / d * before[:, :, n, None]
        numerator, total = numerator + read[..., :-1], total + read[..., -1:]
        written = factor * (k[..., i] * k[..., j])[..., None] * F.pad(v, (0, 1), value=1.0)
        end.append(before[:, :, n] + written.sum(2))
    y = (numerator / (total + 1e-12)).transpose(1, 2).flatten(2)
    return y @ p["o_proj.weight"].T, {"recurrent": torch.stack(end, 2)}
