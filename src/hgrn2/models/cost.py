"""What a model costs, from its configuration alone: parameters, operations, bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hgrn2.models.config import HGRN2Config
from hgrn2.models.language import HGRN2LM
from hgrn2.nn.attention import WINDOW_BLOCK
from hgrn2.ops.tiles import CHUNK_SIZE

# AdamW keeps two float32 numbers a parameter beside the weight
_OPTIMIZER_BYTES = 8


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: all, a tied matrix once.
        embedding_parameters: of them, those only looked up: no arithmetic is done with them.
        flops_per_token_6nd: the usual estimate of training, 6 * (parameters - embedding_parameters); norms, biases and
            lower bounds, which are in no product, are among them.
        flops_per_token_forward: multiplications and additions of a forward pass: the products, and the scan in whole
            chunks of 64 tokens, as it is computed whatever the length; element-wise work left out.
        flops_per_token_training: three times that: the backward pass takes two.
        activation_bytes_per_token: held for the backward pass in float32, without the loss's working memory.
        state_bytes: of one sequence while decoding; `attention_bytes_per_token` comes on top with every token.
        attention_bytes_per_token: growth of the attention layers' caches, up to their window.
        weight_bytes: of the weights in float32.
        checkpoint_bytes: of weights and AdamW state in float32.
    """

    parameters: int
    embedding_parameters: int
    flops_per_token_6nd: int
    flops_per_token_forward: int
    flops_per_token_training: int
    activation_bytes_per_token: int
    state_bytes: int
    attention_bytes_per_token: int
    weight_bytes: int
    checkpoint_bytes: int


def cost(config: HGRN2Config, seq_len: int = 2048) -> Cost:
    """Counts what a model costs.

    Args:
        config: the model.
        seq_len: tokens of a training sequence; matters for attention layers only.
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
        flops_per_token_6nd=6 * (parameters - embedding),
        flops_per_token_forward=forward,
        flops_per_token_training=3 * forward,
        activation_bytes_per_token=4 * _activation_numbers(config, recurrent_layers, attention_layers, seq_len),
        state_bytes=state.num_bytes,
        attention_bytes_per_token=attention_layers * _cache_bytes(config),
        weight_bytes=4 * parameters,
        checkpoint_bytes=(4 + _OPTIMIZER_BYTES) * parameters,
    )


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


def _activation_numbers(config: HGRN2Config, recurrent_layers: int, attention_layers: int, seq_len: int) -> int:
    """What eager torch keeps of one token for the backward pass; checked against its saved tensors."""
    width, inner = config.hidden_size, config.intermediate_size or 0

    # a norm's output counts with what reads it; RMSNorm keeps the normalised values for its weight as well
    def norm(kind: str, affine: bool) -> int:
        return (2 if kind == "rmsnorm" and affine else 1) * width

    block_norm = norm(config.block_norm, config.elementwise_affine)
    dropout = width if config.dropout else 0
    # inputs of both norms and what leaves them, the gate and up branches, the activated gate and their product
    gate = 1 if config.glu_activation != "none" else 0
    block = 2 * (block_norm + width + dropout) + (3 + gate) * inner
    # q, z, v, the norm's input and output, and with a convolution its padded inputs
    recurrent = 4 * width + norm(config.mixer_norm, config.mixer_norm_affine)
    recurrent += 3 * width if config.use_short_conv else 0
    attention = 0
    if config.attn is not None:
        head = width // config.attn.num_heads
        # q, k, v and the output, the sums of the scores, the angles of the rotation, and the row of a window's mask
        attention = 2 * width + 2 * (config.attn.num_kv_heads or 0) * head + config.attn.num_heads
        window = config.attn.window_size or seq_len
        attention += min(seq_len, max(window, WINDOW_BLOCK) + window - 1) if window < seq_len else 0
        attention += 2 * head if config.attn.rope_theta is not None else 0
    layers = config.num_hidden_layers * block + recurrent_layers * recurrent + attention_layers * attention
    return layers + block_norm + width + dropout


def _cache_bytes(config: HGRN2Config) -> int:
    if config.attn is None:
        return 0
    head = config.hidden_size // config.attn.num_heads
    return 2 * 4 * (config.attn.num_kv_heads or 0) * head + 1
