"""HGRN2 once more, from the equations alone: plain torch, one token at a time, nothing of the package's layers."""

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid, "gelu": F.gelu, "none": lambda x: x}


def logits(c, p: dict[str, Tensor], ids: Tensor, training: bool = False) -> Tensor:
    """[B, T, vocab] of a config's model with parameters p, for token ids [B, T]."""
    x = p["model.embeddings.weight"][ids] * (c.hidden_size**0.5 if c.scale_embedding else 1)
    beta = bounds(p.get("model.lower_bounds"), c.lower_bound if c.use_lower_bound else "none", x)
    features = []
    for layer in range(c.num_hidden_layers):
        at = f"model.layers.{layer}."
        attends = c.attn is not None and layer in c.attn.layers
        h = norm(x, p, f"{at}attn_norm", c.block_norm, c.norm_eps)
        x = x + (
            attention(c, p, f"{at}attn.", h)
            if attends
            else mixer(c, p, f"{at}attn.", h, beta[layer], training, features)
        )
        h = norm(x, p, f"{at}mlp_norm", c.block_norm, c.norm_eps)
        gate = ACTIVATIONS[c.glu_activation](linear(h, p, f"{at}mlp.gate_proj"))
        x = x + linear(gate * linear(h, p, f"{at}mlp.up_proj"), p, f"{at}mlp.down_proj")
    return norm(x, p, "model.norm", c.block_norm, c.norm_eps) @ p["lm_head.weight"].T


def mixer(c, p, at, x, beta, training, features):
    q, z, v = (linear(x, p, f"{at}{name}_proj") for name in "qfi")
    if c.use_short_conv:
        q, z, v = (short_conv(y, p[f"{at}{name}_conv1d.weight"]) for y, name in ((q, "q"), (z, "f"), (v, "i")))
    q, v = ACTIVATIONS[c.q_activation](q), ACTIVATIONS[c.v_activation](v)
    f, k = beta + (1 - beta) * torch.sigmoid(z), (1 - beta) * torch.sigmoid(-z)
    if c.gate_range == "signed":
        f, k = 2 * f - 1, 2 * k
    if training and c.min_log_decay is not None:
        f = f.log().clamp(min=c.min_log_decay).exp()
    if c.dense_state:
        k, v = fuse(p, f"{at}dense.", x, k, v, features, c)
    q, k, v, f = (y.unflatten(-1, (-1, c.expand_ratio)) for y in (q, k, v, f))
    state, outputs = torch.zeros(1, dtype=x.dtype), []
    for t in range(x.shape[1]):
        state = f[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(2).flatten(1))
    y = torch.stack(outputs, 1) * (c.expand_ratio**-0.5 if c.scale is None else c.scale)
    return linear(norm(y, p, f"{at}g_norm", c.mixer_norm, c.mixer_norm_eps), p, f"{at}o_proj")


def fuse(p, at, x, k, v, features, c):
    """DenseSSM: the keys and values of earlier layers through gates computed from x."""
    earlier = features[-c.dense_state :]
    features.append((k, v))
    if not earlier:
        return k, v
    gates = (F.silu(linear(F.silu(linear(x, p, f"{at}{name}_down")), p, f"{at}{name}_up")) for name in "kv")
    k, v = (
        own + sum(gate * past[i] for past in earlier) for i, (own, gate) in enumerate(zip((k, v), gates, strict=True))
    )
    return k, norm(v, p, f"{at}v_norm", "rmsnorm", c.mixer_norm_eps)


def bounds(gamma, kind, x):
    if kind == "none":
        return torch.zeros(1000, 1, dtype=x.dtype)
    share = gamma.exp() / gamma.exp().sum(0)
    return share.cumsum(0) - (share[0] if kind == "inclusive" else share)


def norm(x, p, name, kind, eps):
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * p.get(f"{name}.weight", 1) + p.get(f"{name}.bias", 0)


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)


def short_conv(x, weight):
    width = weight.shape[-1]
    y = torch.zeros_like(x)
    for back in range(min(width, x.shape[1])):
        y[:, back:] += weight[:, 0, width - 1 - back] * x[:, : x.shape[1] - back]
    return y


def attention(c, p, at, x):
    a, size = c.attn, c.hidden_size // c.attn.num_heads
    q, k, v = (linear(x, p, f"{at}{name}_proj").unflatten(-1, (-1, size)) for name in "qkv")
    y = torch.zeros_like(q)
    for t in range(x.shape[1]):
        first = 0 if a.window_size is None else max(0, t - a.window_size + 1)
        for head in range(a.num_heads):
            group = head // (a.num_heads // a.num_kv_heads)
            query = rotate(q[:, t, head], t, a.rope_theta)
            scores = [(query * rotate(k[:, s, group], s, a.rope_theta)).sum(-1) for s in range(first, t + 1)]
            weights = (torch.stack(scores, -1) / size**0.5).softmax(-1)
            y[:, t, head] = (weights.unsqueeze(-1) * v[:, first : t + 1, group]).sum(1)
    return linear(y.flatten(2), p, f"{at}o_proj")


def rotate(x, position, theta):
    if theta is None:
        return x
    half = x.shape[-1] // 2
    angle = position * theta ** (-2 * torch.arange(half, dtype=x.dtype) / x.shape[-1])
    turned = torch.view_as_complex(torch.stack([x[..., :half], x[..., half:]], -1)) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([turned.real, turned.imag], -1)
