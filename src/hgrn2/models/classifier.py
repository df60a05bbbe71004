"""A classifier of sequences: embedding, blocks of any mixer in any direction, pooling, head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from hgrn2.constraints import Ge, Le, check_fields
from hgrn2.errors import UserError
from hgrn2.models.backbone import build_block, embed, hand_out_bounds, run_layers
from hgrn2.models.block_stack import BlockStack
from hgrn2.models.config import HGRN2Config
from hgrn2.models.inputs import check_mixers
from hgrn2.nn.batch_norm import BatchNorm
from hgrn2.nn.mixers import Context, Mixer, check_directions, read_directions
from hgrn2.nn.norm import Norm
from hgrn2.nn.parameters import InitialValues, draw, parameter_roles
from hgrn2.ops import check_backend
from hgrn2.shapes import describe


@dataclass(frozen=True)
class ClassifierOptions:
    """Settings of a classifier besides those of its layers in `HGRN2Config`, which also sizes the embedding.

    Attributes:
        num_classes: C.
        input: "tokens" for ids to embed, or "values" for `channels` numbers per token, which are mapped linearly.
        channels: numbers per token of "values".
        directions: direction of each layer, as `hgrn2.nn.mixers.read_directions` reads it.
        pooling: "mean" of the tokens, or the "last" or "first" of them; padding is left out.
        positions: length of the longest sequence, to learn an embedding of each position; 0 for none.
        batch_norm: whether the blocks have BatchNorm, as the official code has in some tasks; without padding only.
        num_sequences: 1, or 2 for pairs, whose encodings x and y enter the head as [x, y, x * y, |x - y|].
        head_hidden_size: width of a hidden layer of the head; 0 for a linear head.
        grid_width: tokens per row for directions over a grid; 0 for sequences.
        num_masked_classes: number of values of a masked token, for pretraining on the inputs (arXiv 2310.02980); 0
            for no pretraining.
    """

    num_classes: Annotated[int, Ge(2)] = 2
    input: Literal["tokens", "values"] = "tokens"
    channels: Annotated[int, Ge(1)] = 1
    directions: Any = "bidirectional"
    pooling: Literal["mean", "last", "first"] = "mean"
    positions: Annotated[int, Ge(0)] = 0
    batch_norm: bool = False
    num_sequences: Annotated[int, Ge(1), Le(2)] = 1
    head_hidden_size: Annotated[int, Ge(0)] = 0
    grid_width: Annotated[int, Ge(0)] = 0
    num_masked_classes: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        check_fields(self, "classifier")


class SequenceClassifier(BlockStack):
    """Classifier of sequences of token ids or values, or of pairs of sequences.

    Args:
        config: configuration of the layers; vocab_size sizes the embedding.
        options: settings of the classifier.
        backend: name of the operators' backend, or "auto".

    Raises:
        UserError: a direction does not exist, or a mixer cannot run in it.

    Example:
        >>> import torch
        >>> from hgrn2.models import presets
        >>> from hgrn2.models.classifier import ClassifierOptions, SequenceClassifier
        >>> model = SequenceClassifier(presets.tiny(vocab_size=17), ClassifierOptions(num_classes=10))
        >>> model(torch.randint(17, (2, 30)), lengths=torch.tensor([30, 12])).shape
        torch.Size([2, 10])
    """

    def __init__(self, config: HGRN2Config, options: ClassifierOptions, backend: str = "auto"):
        super().__init__()
        check_backend(backend)
        self.config, self.options = config, options
        self.directions = read_directions(options.directions, config.num_hidden_layers)
        check_directions(self.directions, config.layer_mixers)
        width = config.hidden_size
        self.embeddings = (
            nn.Embedding(config.vocab_size, width) if options.input == "tokens" else nn.Linear(options.channels, width)
        )
        self.positions = nn.Embedding(options.positions, width) if options.positions else None
        bounds = torch.empty(config.num_hidden_layers, width) if config.has_lower_bounds else None
        self.lower_bounds = None if bounds is None else nn.Parameter(bounds)
        self._bounded_layers = config.bounded_layers
        blocks = [build_block(config, i, backend) for i in range(config.num_hidden_layers)]
        for layer, direction in zip(blocks, self.directions, strict=True):
            assert isinstance(layer.attn, Mixer)
            layer.attn.set_direction(direction)
            if options.batch_norm:
                layer.attn_norm = BatchNorm(width, config.norm_eps)
                if layer.mlp is not None:
                    layer.mlp_norm = BatchNorm(width, config.norm_eps)
        self.layers = nn.ModuleList(blocks)
        self.norm = Norm(config.block_norm, width, config.norm_eps, config.elementwise_affine)
        joined = width * (4 if options.num_sequences == 2 else 1)
        hidden = options.head_hidden_size
        self.head_hidden = nn.Linear(joined, hidden) if hidden else None
        self.head = nn.Linear(hidden or joined, options.num_classes)
        masked = options.num_masked_classes
        self.mask_embedding = nn.Parameter(torch.zeros(width)) if masked else None
        self.token_head = nn.Linear(width, masked) if masked else None
        if not self.head.weight.is_meta:
            self.initialize()

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw initial weights, those of the layers as `HGRN2LM.initialize` does.

        Args:
            generator: source of the random numbers; None for torch's global one.
        """
        std = self.config.initializer_range
        # values have about unit variance, and few channels
        draw(self.embeddings, std if isinstance(self.embeddings, nn.Embedding) else 1.0, generator)
        if self.positions is not None:
            draw(self.positions, std, generator)
        if self.lower_bounds is not None:
            nn.init.zeros_(self.lower_bounds)
        for i, layer in enumerate(self.layers):
            layer.reset_parameters(InitialValues(std, i, len(self.layers), generator))  # pyright: ignore
        draw(self.norm, std, generator)
        if self.mask_embedding is not None:
            nn.init.zeros_(self.mask_embedding)
        for module in (self.head_hidden, self.head, self.token_head):
            if module is not None:
                draw(module, std, generator)

    def parameter_roles(self) -> dict[str, str]:
        """Return the optimizer's role of each parameter, by name."""
        roles = parameter_roles(self) | {"head.weight": "head"}
        if self.lower_bounds is not None:
            roles["lower_bounds"] = "lower_bounds"
        if not isinstance(self.embeddings, nn.Embedding):
            roles["embeddings.weight"] = "embedding"
        return roles

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the logits of each sequence, or of each pair.

        Args:
            inputs: [B, T] ids or [B, T, channels] values; pairs have an axis of 2 after B.
            lengths: [B] or [B, 2], number of tokens of each sequence before its padding; None if there is no padding.

        Returns:
            [B, C].

        Raises:
            UserError: shapes do not fit, or there is padding and BatchNorm or a mixer does not support it.
        """
        if self.options.num_sequences == 2:
            if inputs.dim() < 3 or inputs.shape[1] != 2:
                raise UserError(f"inputs is {describe(inputs)}; wanted pairs [B, 2, T]")
            inputs, lengths = inputs.flatten(0, 1), None if lengths is None else lengths.flatten()
        pooled = self.encode(inputs, lengths)
        if self.options.num_sequences == 2:
            first, second = pooled.unflatten(0, (-1, 2)).unbind(1)
            pooled = torch.cat([first, second, first * second, (first - second).abs()], -1)
        if self.head_hidden is not None:
            pooled = nn.functional.gelu(self.head_hidden(pooled))
        return self.head(pooled)

    def encode(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the pooled hidden states [B, D]; arguments as for `forward`, without pairs."""
        x = self.hidden_states(inputs, lengths)
        if self.options.pooling == "first":
            return x[:, 0]
        if lengths is None:
            return x[:, -1] if self.options.pooling == "last" else x.mean(1)
        if self.options.pooling == "last":
            places = (lengths - 1).clamp(min=0).long()
            return x.gather(1, places[:, None, None].expand(-1, 1, x.shape[-1])).squeeze(1)
        mask = mask_of(lengths, x.shape[1])
        # padding may hold NaN, which stays NaN times zero
        x = x.masked_fill(~mask[..., None], 0)
        return x.sum(1) / lengths.clamp(min=1)[:, None].to(x.dtype)

    def masked_logits(self, inputs: Tensor, lengths: Tensor | None, is_masked: Tensor) -> Tensor:
        """Return the logits [B, T, num_masked_classes] of each token's value, with some tokens hidden.

        Args:
            inputs: [B, T] or [B, T, channels].
            lengths: [B], or None.
            is_masked: [B, T] bool, tokens whose embedding is replaced by a learned one.
        """
        assert self.token_head is not None, "num_masked_classes is 0"
        return self.token_head(self.hidden_states(inputs, lengths, is_masked))

    def hidden_states(self, inputs: Tensor, lengths: Tensor | None = None, is_masked: Tensor | None = None) -> Tensor:
        """Return the hidden states [B, T, D] after the last norm; their values at padding are arbitrary.

        Args:
            inputs: [B, T] or [B, T, channels].
            lengths: [B], or None.
            is_masked: [B, T] bool, tokens to hide; None for none.
        """
        if lengths is not None:
            if self.options.batch_norm:
                raise UserError("classifier: batch_norm counts padding as tokens; leave it out", "contradiction")
            check_mixers(set(self.config.layer_mixers), None, lengths)
        is_ids = isinstance(self.embeddings, nn.Embedding)
        if inputs.dim() != (2 if is_ids else 3):
            raise UserError(f"inputs is {describe(inputs)}; wanted {'ids [B, T]' if is_ids else 'values [B, T, C]'}")
        x = self.embeddings(inputs.long() if is_ids else inputs)
        if is_masked is not None and self.mask_embedding is not None:
            x = torch.where(is_masked[..., None], self.mask_embedding.to(x.dtype), x)
        seq_len = x.shape[1]
        if self.positions is not None:
            if seq_len > self.options.positions:
                raise UserError(
                    f"inputs has {seq_len} tokens; the model has {self.options.positions} positions", "mismatch"
                )
            x = x + self.positions.weight[:seq_len].to(x.dtype)
        x = embed(x, self.config, self.training)
        x, bounds = hand_out_bounds(
            x, self.lower_bounds, self.config.lower_bound, self._bounded_layers, len(self.layers),
            detach_first=not self.is_compiled,
        )  # fmt: skip
        width = self.options.grid_width
        if width and seq_len % width:
            raise UserError(f"inputs has {seq_len} tokens; wanted rows of {width} (grid_width)", "mismatch")
        context = Context(
            mask=None if lengths is None else mask_of(lengths, seq_len),
            grid=(seq_len // width, width) if width else None,
            keep_state=False,
        )
        x = run_layers(self.layers, x, [None] * len(self.layers), context, bounds, call=self.call_layer)
        return self.norm(x)

    @property
    def drop_rate_of_blocks(self) -> float:
        """Probability of dropout inside the blocks."""
        return self.config.dropout


def mask_of(lengths: Tensor, seq_len: int) -> Tensor:
    """Return [B, T] bool, False where there is padding.

    Args:
        lengths: [B] tokens of each sequence.
        seq_len: T.
    """
    return torch.arange(seq_len, device=lengths.device) < lengths[:, None]
