"""Count parameters, operations and bytes of a model from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from hgrn2.models.config import HGRN2Config
from hgrn2.models.language import HGRN2LM
from hgrn2.nn.block import Block
from hgrn2.quantities import plural

# AdamW keeps two float32 numbers per parameter
_OPTIMIZER_BYTES = 8


@dataclass(frozen=True)
class Cost:
    """Costs of a model, counted from its configuration.

    Attributes:
        parameters: number of parameters; a tied matrix counts once.
        embedding_parameters: parameters that are only looked up, never multiplied.
        flops_per_token_6n: the usual estimate for training, 6 N per token (6 N D for D tokens), with
            N = parameters - embedding_parameters. It includes norms, biases and lower bounds, which no product uses.
        flops_per_token_forward: multiplications and additions of a forward pass: the matrix products, and the scan in
            whole chunks of 64 tokens. Element-wise operations are not counted.
        flops_per_token_training: three times the forward pass, as the backward pass takes two times.
        activation_bytes_per_token: saved for the backward pass in float32, without the working memory of the loss.
        activation_bytes_per_token_bfloat16: the same under bfloat16 autocast (`precision = "bfloat16"`).
        activation_bytes_per_token_checkpointed: the same in float32 with activation checkpointing: the input of every
            layer, and all of one layer while its backward pass runs.
        state_bytes: state of one sequence while decoding in float32, without caches that grow with the tokens read.
        attention_bytes_per_token: growth of all caches, attention's and other mixers', with every token, up to their
            limits; `cache_costs` returns them one by one.
        attention_window: number of tokens after which all caches stop growing; None without a limit or a cache.
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
    attention_window: int | None
    weight_bytes: int
    weight_bytes_bfloat16: int
    checkpoint_bytes: int


@dataclass(frozen=True)
class CacheCost:
    """Cost of the caches of a mixer, which grow with the tokens read.

    Attributes:
        mixer: name of the mixer.
        bytes_per_token: growth of all its layers with every token of a sequence, in float32.
        limit: number of tokens kept; None for all.
    """

    mixer: str
    bytes_per_token: int
    limit: int | None

    def bytes_after(self, num_tokens: int) -> int:
        """Return the bytes per sequence after some tokens."""
        return self.bytes_per_token * (num_tokens if self.limit is None else min(num_tokens, self.limit))


@dataclass(frozen=True)
class CostLine:
    """One line of a table of costs.

    Attributes:
        label: the name of the quantity.
        value: the quantity itself.
        unit: "bytes", or "" for a plain count.
        note: what is included or left out.
    """

    label: str
    value: int
    unit: Literal["", "bytes"]
    note: str


def cost(config: HGRN2Config, seq_len: int = 2048) -> Cost:
    """Count the costs of a model.

    Args:
        config: the model.
        seq_len: length of a training sequence; only attention layers depend on it.
    """
    model = shapes_of(config)
    parameters = model.num_parameters()
    roles = model.parameter_roles()
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    # one multiplication and one addition per weight; a tied embedding is also the head
    linear = sum(
        2 * p.numel()
        for name, p in model.named_parameters()
        if roles[name] in ("matrix", "head") or (roles[name] == "embedding" and config.tie_word_embeddings)
    )
    blocks: list[Block] = list(model.model.layers)  # pyright: ignore[reportAssignmentType]
    forward = linear + sum(block.attn.flops_in_direction(seq_len) for block in blocks)
    caches = _caches_of(model)
    limits = [cache.limit for cache in caches if cache.limit is not None]
    return Cost(
        parameters=parameters,
        embedding_parameters=embedding,
        flops_per_token_6n=6 * (parameters - embedding),
        flops_per_token_forward=forward,
        flops_per_token_training=3 * forward,
        activation_bytes_per_token=activation_bytes(model, seq_len, 4),
        activation_bytes_per_token_bfloat16=activation_bytes(model, seq_len, 2),
        activation_bytes_per_token_checkpointed=activation_bytes(model, seq_len, 4, checkpointed=True),
        state_bytes=sum(spec.num_bytes for layer in model.state_spec() for spec in layer.values()),
        attention_bytes_per_token=sum(cache.bytes_per_token for cache in caches),
        attention_window=max(limits) if limits and len(limits) == len(caches) else None,
        weight_bytes=4 * parameters,
        weight_bytes_bfloat16=2 * parameters,
        checkpoint_bytes=(4 + _OPTIMIZER_BYTES) * parameters,
    )


def cache_costs(config: HGRN2Config) -> list[CacheCost]:
    """Return the costs of the caches of a model, by mixer and limit; none for a mixer with a state of fixed size.

    Args:
        config: the model.
    """
    return _caches_of(shapes_of(config))


def shapes_of(config: HGRN2Config) -> HGRN2LM:
    """Return a model without values."""
    with torch.device("meta"):
        return HGRN2LM(config)


def _caches_of(model: HGRN2LM) -> list[CacheCost]:
    growth: dict[tuple[str, int | None], int] = {}
    for mixer, specs in zip(model.config.layer_mixers, model.state_spec(), strict=True):
        for spec in specs.values():
            if spec.bytes_per_token:
                growth[mixer, spec.limit] = growth.get((mixer, spec.limit), 0) + spec.bytes_per_token
    return [CacheCost(mixer, grown, limit) for (mixer, limit), grown in growth.items()]


def cost_table(config: HGRN2Config, seq_len: int = 2048) -> list[CostLine]:
    """Return the costs of a model as a table to print, without lines that do not apply.

    Args:
        config: the model.
        seq_len: length of a training sequence.
    """
    c = cost(config, seq_len)
    tied = config.tie_word_embeddings
    of_attention = f", {seq_len:,} tokens per sequence" if c.attention_bytes_per_token else ""
    lines = [
        CostLine("parameters (N)", c.parameters, "", "tied embedding counted once" if tied else ""),
        CostLine("training FLOPs per token", c.flops_per_token_6n, "", "6 N" if tied else "6 N, without the embedding"),
        CostLine("training FLOPs per token", c.flops_per_token_training, "", "counted: 3 x the forward pass"),
        CostLine("forward FLOPs per token", c.flops_per_token_forward, "", f"counted, with the scan{of_attention}"),
        CostLine("activations a token", c.activation_bytes_per_token, "bytes", "training in float32"),
        CostLine("activations a token", c.activation_bytes_per_token_bfloat16, "bytes", "training under bfloat16"),
        CostLine("activations a token", c.activation_bytes_per_token_checkpointed, "bytes", "float32, checkpointed"),
        CostLine("state of a sequence", c.state_bytes, "bytes", "float32, of any length"),
    ]
    for cache in cache_costs(config):
        limit = "without a limit" if cache.limit is None else f"up to {plural(cache.limit, 'token')}"
        lines.append(CostLine(f"{cache.mixer} cache per token", cache.bytes_per_token, "bytes", f"float32, {limit}"))
    return [
        *lines,
        CostLine("weights", c.weight_bytes, "bytes", "float32"),
        CostLine("weights", c.weight_bytes_bfloat16, "bytes", "bfloat16"),
        CostLine("checkpoint of a run", c.checkpoint_bytes, "bytes", "float32, with AdamW's state"),
    ]


def activation_bytes(model: HGRN2LM, seq_len: int, low: int, *, checkpointed: bool = False) -> int:
    """Count the bytes per token that eager torch saves for the backward pass; tests compare them with torch.

    Args:
        model: a model on any device.
        seq_len: length of a sequence.
        low: bytes of a number whose precision autocast may lower; residuals and the insides of norms are float32.
        checkpointed: whether only the inputs of the layers, and the activations of a single layer, are stored.
    """
    config = model.config
    layers = [layer.activation_bytes(seq_len, low) for layer in model.model.layers]  # pyright: ignore
    ends = model.model.norm.activation_bytes(low) + (4 * config.hidden_size if config.dropout else 0)
    if checkpointed:
        return len(layers) * 4 * config.hidden_size + max(layers) + ends
    return sum(layers) + ends
