"""Counts what a model costs, from its configuration alone: parameters, operations, bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from hgrn2.models.config import HGRN2Config
from hgrn2.models.language import HGRN2LM
from hgrn2.nn.mixers.attention import WINDOW_BLOCK
from hgrn2.ops.tiles import CHUNK_SIZE

# AdamW keeps two float32 numbers a parameter beside the weight
_OPTIMIZER_BYTES = 8


@dataclass(frozen=True)
class Cost:
    """Costs of a model, counted from its configuration.

    Attributes:
        parameters: all of them; a tied matrix counts once.
        embedding_parameters: parameters that are only looked up and never multiplied.
        flops_per_token_6n: the usual estimate of training, 6 N a token (6 N D for D tokens), with
            N = parameters - embedding_parameters. It includes norms, biases and lower bounds, which are in no product.
        flops_per_token_forward: multiplications and additions of a forward pass: the matrix products, and the scan in
            whole chunks of 64 tokens, as it is computed whatever the length. Element-wise work is left out.
        flops_per_token_training: three times the forward pass, as the backward pass takes two.
        activation_bytes_per_token: kept for the backward pass in float32, without the loss's working memory.
        activation_bytes_per_token_bfloat16: the same under bfloat16 autocast (`precision = "bfloat16"`).
        activation_bytes_per_token_checkpointed: the same in float32 with activation checkpointing: the input of every
            layer, and all of one layer while its backward pass runs.
        state_bytes: state of one sequence while decoding in float32; caches of attention layers come on top.
        attention_bytes_per_token: growth of the attention layers' caches with every token, up to their window.
        weight_bytes: the weights in float32.
        weight_bytes_bfloat16: the weights in bfloat16.
        checkpoint_bytes: weights and AdamW state in float32, as a checkpoint of a run holds them.
    """

    parameters: int
    embedding_parameters: int
    flops_per_token_6n: int
    flops_per_token_forward: int
    flops_per_token_training: int
    activation_bytes_per_token: int
    activation_bytes_per_token_bfloat16: int
    activation_bytes_per_token_checkpointed: int
    state_bytes: int
    attention_bytes_per_token: int
    weight_bytes: int
    weight_bytes_bfloat16: int
    checkpoint_bytes: int


@dataclass(frozen=True)
class CostLine:
    """One line of a table of costs.

    Attributes:
        label: the name of the quantity.
        value: how much.
        unit: "bytes", or "" for a plain count.
        note: what is and is not included.
    """

    label: str
    value: int
    unit: Literal["", "bytes"]
    note: str


def cost(config: HGRN2Config, seq_len: int = 2048) -> Cost:
    """Counts what a model costs.

    Args:
        config: the model.
        seq_len: tokens of a training sequence; it matters for attention layers only.
    """
    with torch.device("meta"):
        model = HGRN2LM(config)
    parameters = model.num_parameters()
    roles = model.parameter_roles()
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    # every matrix takes one multiplication and one addition a weight; a tied embedding works as the head
    linear = sum(
        2 * p.numel()
        for name, p in model.named_parameters()
        if roles[name] in ("matrix", "head") or (roles[name] == "embedding" and config.tie_word_embeddings)
    )
    attention_layers = len(config.attn.layers) if config.attn else 0
    recurrent_layers = config.num_hidden_layers - attention_layers
    forward = linear + recurrent_layers * _mixer_flops(config) + attention_layers * _attention_flops(config, seq_len)
    state = model.init_state(1, "meta")
    return Cost(
        parameters=parameters,
        embedding_parameters=embedding,
        flops_per_token_6n=6 * (parameters - embedding),
        flops_per_token_forward=forward,
        flops_per_token_training=3 * forward,
        activation_bytes_per_token=_activation_bytes(config, seq_len, 4),
        activation_bytes_per_token_bfloat16=_activation_bytes(config, seq_len, 2),
        activation_bytes_per_token_checkpointed=_activation_bytes(config, seq_len, 4, checkpointed=True),
        state_bytes=state.num_bytes,
        attention_bytes_per_token=attention_layers * _cache_bytes(config),
        weight_bytes=4 * parameters,
        weight_bytes_bfloat16=2 * parameters,
        checkpoint_bytes=(4 + _OPTIMIZER_BYTES) * parameters,
    )


def cost_table(config: HGRN2Config, seq_len: int = 2048) -> list[CostLine]:
    """Lists what a model costs, for people; lines that do not apply to the model are left out.

    Args:
        config: the model.
        seq_len: as for `cost`.
    """
    c = cost(config, seq_len)
    tied = config.tie_word_embeddings
    of_attention = f", {seq_len:,} tokens a sequence" if config.attn else ""
    lines = [
        CostLine("parameters (N)", c.parameters, "", "tied embedding counted once" if tied else ""),
        CostLine("training FLOPs a token", c.flops_per_token_6n, "", "6 N" if tied else "6 N, without the embedding"),
        CostLine("training FLOPs a token", c.flops_per_token_training, "", "counted: 3 x the forward pass"),
        CostLine("forward FLOPs a token", c.flops_per_token_forward, "", f"counted, with the scan{of_attention}"),
        CostLine("activations a token", c.activation_bytes_per_token, "bytes", "training in float32"),
        CostLine("activations a token", c.activation_bytes_per_token_bfloat16, "bytes", "training under bfloat16"),
        CostLine("activations a token", c.activation_bytes_per_token_checkpointed, "bytes", "float32, checkpointed"),
        CostLine("state of a sequence", c.state_bytes, "bytes", "float32, whatever its length"),
    ]
    if config.attn:
        upto = f"up to {config.attn.window_size:,} tokens" if config.attn.window_size else "without a limit"
        lines.append(CostLine("attention cache a token", c.attention_bytes_per_token, "bytes", f"float32, {upto}"))
    return [
        *lines,
        CostLine("weights", c.weight_bytes, "bytes", "float32"),
        CostLine("weights", c.weight_bytes_bfloat16, "bytes", "bfloat16"),
        CostLine("checkpoint of a run", c.checkpoint_bytes, "bytes", "float32, with AdamW's state"),
    ]


def _mixer_flops(config: HGRN2Config) -> int:
    """The chunkwise scan of one layer, a token: scores within the chunk, their sum of values, state in and out."""
    width, chunk = config.expand_ratio, CHUNK_SIZE
    per_head = (chunk + 1) * width + 2 * chunk * width + 4 * width * width
    # each join of blocks multiplies one query or key row by a decay, and the decays of the pair
    per_head += round(width * math.log2(chunk))
    conv = 6 * config.conv_size * config.hidden_size if config.use_short_conv else 0
    return (config.num_heads or 0) * per_head + conv


def _attention_flops(config: HGRN2Config, seq_len: int) -> int:
    """Scores and their sum of values over the keys a query sees on average."""
    window = (config.attn.window_size if config.attn else None) or seq_len
    window = min(window, seq_len)
    seen = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
    return round(4 * seen * config.hidden_size)


def _activation_bytes(config: HGRN2Config, seq_len: int, low: int, *, checkpointed: bool = False) -> int:
    """Counts what eager torch keeps of one token for the backward pass; tests compare it with torch's saved tensors.

    Args:
        config: the model.
        seq_len: tokens of a sequence.
        low: bytes of a number that autocast would lower; residuals and the insides of norms are float32 always.
        checkpointed: only the input of every layer is kept, and one whole layer.
    """
    width, inner, high = config.hidden_size, config.intermediate_size or 0, 4

    # the input in float32 and the output; RMSNorm keeps the normalised values for its weight as well
    def norm(kind: str, affine: bool) -> int:
        return (high * (2 if kind == "rmsnorm" and affine else 1) + low) * width

    block_norm = norm(config.block_norm, config.elementwise_affine)
    dropout = width if config.dropout else 0
    # both norms, the gate and up branches, the activated gate and their product
    gate = 1 if config.glu_activation != "none" else 0
    block = 2 * (block_norm + low * dropout) + low * (3 + gate) * inner
    # q, z, v, the norm, and with a convolution its padded inputs
    recurrent = low * 3 * width + norm(config.mixer_norm, config.mixer_norm_affine)
    recurrent += low * 3 * width if config.use_short_conv else 0
    layers = {"recurrent": block + recurrent}
    attention_layers = 0
    if config.attn is not None:
        attention_layers = len(config.attn.layers)
        head = width // config.attn.num_heads
        # q, k, v and the output, the sums of the scores, and the row of a window's mask
        attention = 2 * width + 2 * (config.attn.num_kv_heads or 0) * head + config.attn.num_heads
        window = config.attn.window_size or seq_len
        attention += min(seq_len, max(window, WINDOW_BLOCK) + window - 1) if window < seq_len else 0
        # angles of the rotation
        angles = high * 2 * head if config.attn.rope_theta is not None else 0
        layers["attention"] = block + low * attention + angles
    ends = block_norm + high * dropout
    if checkpointed:
        return config.num_hidden_layers * high * width + max(layers.values()) + ends
    recurrent_layers = config.num_hidden_layers - attention_layers
    return recurrent_layers * layers["recurrent"] + attention_layers * layers.get("attention", 0) + ends


def _cache_bytes(config: HGRN2Config) -> int:
    if config.attn is None:
        return 0
    head = config.hidden_size // config.attn.num_heads
    return 2 * 4 * (config.attn.num_kv_heads or 0) * head + 1
