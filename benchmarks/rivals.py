"""Other ways to run the gated recurrence, for comparison.

Compiled log-space chunks, ONNX Runtime's LinearAttention, and flash-linear-attention's kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import environment  # noqa: F401  (before torch)
import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 64
BLOCK = 16


def log_space_scan(q: Tensor, z: Tensor, v: Tensor, lower_bound: Tensor) -> Tensor:
    """The usual chunkwise form: cumulative log decays and exponentials of their differences.

    Meant for torch.compile. Right for benign gates only: inside a block of 16 rows it takes exp of up to 15 log decays.

    Args:
        q: [B, T, H, K], T a multiple of 64, pre-activation of the query.
        z: [B, T, H, K], pre-activation of the gate.
        v: [B, T, H, V].
        lower_bound: [H, K].

    Returns:
        y [B, T, H, V].
    """

    def chunks(x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, (-1, CHUNK))  # [B, H, chunks, C, K or V]

    key = (1 - lower_bound) * torch.sigmoid(-z)
    log_f = torch.log(lower_bound + (1 - lower_bound) * torch.sigmoid(z))
    query, key, v, b = chunks(functional.silu(q)), chunks(key), chunks(v), chunks(log_f).cumsum(3)
    end = b[..., -1:, :]
    rows = []
    for start in range(0, CHUNK, BLOCK):
        stop = start + BLOCK
        # cumulative decay before the block: both factors stay finite, and below 1 but for the block itself
        reference = b[..., start - 1 : start, :] if start else torch.zeros_like(b[..., :1, :])
        late = query[..., start:stop, :] * torch.exp(b[..., start:stop, :] - reference)
        early = key[..., :stop, :] * torch.exp(reference - b[..., :stop, :])
        scores = (late @ early.mT).tril(start)
        rows.append(scores @ v[..., :stop, :])
    update = (key * torch.exp(end - b)).mT @ v
    decay = torch.exp(end).mT
    state, states = torch.zeros_like(update[:, :, 0]), []
    for i in range(update.shape[2]):
        states.append(state)
        state = decay[:, :, i] * state + update[:, :, i]
    y = torch.cat(rows, 3) + (query * torch.exp(b)) @ torch.stack(states, 2)
    return y.flatten(2, 3).transpose(1, 2)


def onnx_linear_attention(
    q: Tensor, z: Tensor, v: Tensor, lower_bound: Tensor, domain: str, gates: bool, threads: int
) -> Callable[[], Tensor]:
    """ONNX Runtime's LinearAttention, update rule "gated": this recurrence, from key and log decay.

    Args:
        q: [B, T, H, K] float32, likewise z, v and lower_bound as in `log_space_scan`.
        z: see q.
        v: see q.
        lower_bound: see q.
        domain: "com.microsoft", or "" for the standard's opset 27.
        gates: compute query, key and log decay inside the ONNX model, from the pre-activations.
        threads: of the runtime.

    Returns:
        A function that runs the model and returns y [B, T, H, V].

    Raises:
        Exception: onnx or onnxruntime cannot build or load the model.
    """
    # a runtime may know an operator set that the standard has not yet released
    os.environ.setdefault("ALLOW_RELEASED_ONNX_OPSET_ONLY", "0")
    import onnxruntime  # pyright: ignore[reportMissingImports]
    from onnx import TensorProto, helper, numpy_helper  # pyright: ignore[reportMissingImports]

    batch, length, heads, _ = q.shape
    bound = lower_bound.reshape(-1)
    attention: Any = helper.make_node(
        "LinearAttention", ["query", "key", "value", "", "decay"], ["y", "state"], domain=domain,
        q_num_heads=heads, kv_num_heads=heads, update_rule="gated", scale=1.0,
    )  # fmt: skip
    constants = {"bound": bound, "free": 1 - bound}
    before = [
        helper.make_node("Sigmoid", ["q"], ["gate_q"]),
        helper.make_node("Mul", ["q", "gate_q"], ["query"]),
        helper.make_node("Sigmoid", ["z"], ["p"]),
        helper.make_node("Mul", ["p", "free"], ["free_p"]),
        helper.make_node("Add", ["free_p", "bound"], ["f"]),
        helper.make_node("Log", ["f"], ["decay"]),
        helper.make_node("Neg", ["z"], ["minus_z"]),
        helper.make_node("Sigmoid", ["minus_z"], ["s"]),
        helper.make_node("Mul", ["s", "free"], ["key"]),
    ]
    if gates:
        feeds = {"q": q, "z": z, "value": v}
    else:
        key = (1 - lower_bound) * torch.sigmoid(-z)
        feeds = {"query": functional.silu(q), "key": key, "value": v, "decay": torch.log1p(-key)}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, length, x.shape[2] * x.shape[3]])
        for name, x in feeds.items()
    ]
    graph = helper.make_graph(
        [*(before if gates else []), attention],
        "scan",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, length, heads * v.shape[3]])],
        [numpy_helper.from_array(x.numpy(), name) for name, x in constants.items()] if gates else [],
    )
    # version 27 is the first of the standard that has the operator; the contributed one needs no new standard
    opsets = [helper.make_opsetid("", 21 if domain else 27)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    arrays = {name: x.flatten(2).contiguous().numpy() for name, x in feeds.items()}

    def run() -> Tensor:
        return torch.from_numpy(session.run(["y"], arrays)[0]).view(batch, length, heads, -1)

    return run


def fla_hgrn2() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """flash-linear-attention's path of HGRN2 from pre-activations to output, as its layer runs it (0.6.0).

    Raises:
        ImportError: the package is not installed.
    """
    from fla.modules.activations import swish  # pyright: ignore[reportMissingImports]
    from fla.ops.gla import chunk_gla  # pyright: ignore[reportMissingImports]

    # a decorator hides its arguments from a type checker
    operator: Any = chunk_gla

    def scan(q: Tensor, z: Tensor, v: Tensor, lower_bound: Tensor) -> Tensor:
        gate = torch.logaddexp(lower_bound.log(), torch.log1p(-lower_bound) + functional.logsigmoid(z))
        key = 1 - gate.exp()
        # the layer leaves the scale to its default; any costs the same
        return operator(q=swish(q), k=key.to(v), v=v, g=gate, scale=1.0, state_v_first=True)[0]

    return scan
