"""The language model, in reading order: embeddings, blocks under their lower bounds, norm, head."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hgrn2.errors import UserError
from hgrn2.models.config import HGRN2Config
from hgrn2.models.generation import generate
from hgrn2.models.inputs import check_state, checked_ids, checked_mask
from hgrn2.models.outputs import LossOutput
from hgrn2.models.sampling import Sampling
from hgrn2.models.state import ModelState
from hgrn2.nn.block import Block
from hgrn2.nn.gates import bounds_of_layers, touch_unused_bounds
from hgrn2.nn.loss import IGNORE, linear_cross_entropy
from hgrn2.nn.mixers.attention import Attention
from hgrn2.nn.mixers.hgrn2 import HGRN2Mixer, forget_gate
from hgrn2.nn.mlp import GatedMLP
from hgrn2.nn.norm import Norm
from hgrn2.ops import check_backend
from hgrn2.ops.checks import check_cu_seqlens
from hgrn2.shapes import describe


class HGRN2Model(nn.Module):
    """Token ids to hidden states.

    Args:
        config: what the model is made of.
        backend: "auto", or the name of one as for `hgrn2.ops.hgrn2_scan`.

    Attributes:
        activation_checkpointing: compute the activations of every layer again in the backward pass instead of keeping
            them: less memory for about a third more time, and the same numbers.
    """

    def __init__(self, config: HGRN2Config, backend: str = "auto"):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.use_lower_bound:
            self.lower_bounds = nn.Parameter(torch.empty(config.num_hidden_layers, config.hidden_size))
        self._recurrent_layers = config.recurrent_layers
        self.layers = nn.ModuleList(build_block(config, i, backend) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.block_norm, config.hidden_size, config.norm_eps, config.elementwise_affine)
        self._call_block: Callable[..., Any] | None = None

    def compile_blocks(self) -> None:
        """Compile a block with torch.compile; all layers of one kind share the result. Used while training alone."""
        self._call_block = torch.compile(_call_block)

    def bounds(self) -> list[Tensor] | list[None]:
        """Returns the lower bound of each layer, [D] each in [0, 1), or None where there is none."""
        if not self.config.use_lower_bound:
            return [None] * len(self.layers)
        return bounds_of_layers(self.lower_bounds, self.config.lower_bound, self._recurrent_layers)

    def forward(
        self,
        input_ids: Tensor,
        state: ModelState | None,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
        keep_state: bool = True,
    ) -> tuple[Tensor, ModelState]:
        """Runs the layers; arguments as in `HGRN2LM.hidden_states`, checked there.

        Returns:
            Hidden states [B, T, D] after the last norm, and the new state.
        """
        x = self.embeddings(input_ids)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.hidden_size)
        x = functional.dropout(x, self.config.dropout, self.training)
        bounds = self.bounds()
        x = touch_unused_bounds(x, bounds, self._recurrent_layers)
        new_layers = []
        for i, (layer, bound) in enumerate(zip(self.layers, bounds, strict=True)):
            before = None if state is None else state.layers[i]
            x, layer_state = self._run(layer, x, bound, before, cu_seqlens, mask, keep_state)
            new_layers.append(layer_state)
        return self.norm(x), ModelState(tuple(new_layers))

    def _run(self, layer: nn.Module, *arguments: Any) -> Any:
        # evaluation meets too many shapes for compiling to be worth its time
        call = self._call_block if self.training and self._call_block is not None else _call_block
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return call(layer, *arguments)
        # dropout is the only thing that draws numbers
        draws = self.training and self.config.dropout > 0
        return checkpoint(call, layer, *arguments, use_reentrant=False, preserve_rng_state=draws)


def _call_block(layer: nn.Module, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    # a function that is given the layer is traced once for all of them
    return layer(*arguments)


def build_block(config: HGRN2Config, layer: int, backend: str = "auto", kind: type[Block] = Block) -> Block:
    """Makes one layer of a model.

    Args:
        config: what the model is made of.
        layer: its index from 0, which decides about the mixer in hybrids.
        backend: "auto", or the name of one as for `hgrn2.ops.hgrn2_scan`.
        kind: the class to make, `Block` or one derived from it.
    """
    if config.attn is not None and layer in config.attn.layers:
        attn = config.attn
        mixer: nn.Module = Attention(
            config.hidden_size, attn.num_heads, attn.num_kv_heads or attn.num_heads, attn.window_size, attn.rope_theta,
            attn.qkv_bias,
        )  # fmt: skip
    else:
        mixer = HGRN2Mixer(
            config.hidden_size,
            config.expand_ratio,
            q_activation=config.q_activation,
            v_activation=config.v_activation,
            scale=config.head_scale,
            norm=config.mixer_norm,
            norm_eps=config.mixer_norm_eps,
            norm_affine=config.mixer_norm_affine,
            bias=config.use_bias,
            conv_size=config.conv_size if config.use_short_conv else 0,
            min_log_decay=config.min_log_decay,
            backend=backend,
        )
    assert config.intermediate_size is not None
    mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.glu_activation, config.use_bias)
    norms = [Norm(config.block_norm, config.hidden_size, config.norm_eps, config.elementwise_affine) for _ in range(2)]
    return kind(mixer, mlp, norms[0], norms[1], config.dropout)


class HGRN2LM(nn.Module):
    """A causal language model.

    All ways to run it agree: a whole prompt, the prompt in pieces with the state handed on, token by token, packed with
    other sequences, or left-padded beside longer ones.

    Args:
        config: what the model is made of.
        backend: "auto", or the name of one as for `hgrn2.ops.hgrn2_scan`.

    Example:
        >>> import torch
        >>> from hgrn2.models import HGRN2LM, presets
        >>> model = HGRN2LM(presets.tiny(vocab_size=257))
        >>> logits, state = model(torch.randint(0, 257, (1, 20)))
        >>> logits, state = model.step(torch.tensor([65]), state)
    """

    def __init__(self, config: HGRN2Config, backend: str = "auto"):
        super().__init__()
        check_backend(backend)
        if not isinstance(config, HGRN2Config):
            raise UserError(
                f"config is {describe(config)}; wanted an hgrn2.HGRN2Config, such as presets.tiny() or "
                "HGRN2Config.from_dict(...)"
            )
        self.config = config
        self.model = HGRN2Model(config, backend)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        if not self.lm_head.weight.is_meta:
            self.initialize()

    @property
    def activation_checkpointing(self) -> bool:
        """Whether the backward pass computes the activations of every layer again instead of keeping them.

        Set it to train with less memory, for about a third more time; losses and gradients stay the same to the last
        bit.
        """
        return self.model.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self.model.activation_checkpointing = on

    def tie_weights(self) -> None:
        """Makes head and embeddings one parameter where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embeddings.weight

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draws initial weights.

        | parameters | distribution |
        | --- | --- |
        | embeddings, head, projections, convolutions | normal, standard deviation `initializer_range` |
        | o_proj and down_proj (the ends of the 2 L residual branches) | the same, divided by sqrt(2 L) |
        | norm weights | 1 |
        | biases, lower_bounds | 0 (so that layer l starts at a bound of l / L) |
        """
        for name, parameter in self.named_parameters():
            if name.endswith(".bias") or name == "model.lower_bounds":
                parameter.zero_()
            elif "norm" in name.split(".")[-2]:
                parameter.fill_(1)
            else:
                std = self.config.initializer_range
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * self.config.num_hidden_layers)
                parameter.normal_(0, std, generator=generator)

    def forward(
        self,
        input_ids: Tensor,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Computes logits of the next token at every place.

        Args:
            input_ids: [B, T] int64.
            state: of the tokens before, from an earlier call or `init_state`; None at a start.
            cu_seqlens: [N + 1] int32 or int64: sequences packed end to end, B = 1; state then holds N sequences.
            attention_mask: [B, T], 0 or False where a token is padding; on the left if the last logits are to be used.

        Returns:
            logits [B, T, vocab_size] and the new state.

        Raises:
            UserError: a mask together with packed sequences, or ids of the wrong shape.
        """
        x, state = self.hidden_states(input_ids, state, cu_seqlens, attention_mask)
        return self.lm_head(x), state

    def hidden_states(
        self,
        input_ids: Tensor,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, ModelState]:
        """Computes what the head reads.

        Args:
            input_ids: [B, T] int64.
            state: of the tokens before, from an earlier call or `init_state`; None at a start.
            cu_seqlens: [N + 1] int32 or int64, bounds of packed sequences, B = 1.
            attention_mask: [B, T], 0 or False where a token is padding.
            keep_state: whether the new state is wanted; without it, it has no tensors.

        Returns:
            Hidden states [B, T, D] after the last norm, and the new state.
        """
        input_ids = checked_ids("input_ids", input_ids, "[B, T]", self.model.embeddings)
        if attention_mask is not None:
            if cu_seqlens is not None:
                raise UserError(
                    "attention_mask and cu_seqlens were both given; packed sequences have no padding, drop the mask"
                )
            attention_mask = checked_mask(attention_mask, input_ids)
        num_sequences = input_ids.shape[0]
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, input_ids, False, "input_ids")
            num_sequences = cu_seqlens.shape[0] - 1
        if state is not None:
            check_state(state, len(self.model.layers), num_sequences, self.model.embeddings)
        return self.model(input_ids, state, cu_seqlens, attention_mask, keep_state)

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,
        keep_state: bool = True,
    ) -> LossOutput:
        """Computes the cross entropy of the next tokens without ever holding all logits.

        Args:
            input_ids: [B, T] int64.
            targets: [B, T] int64, the token that follows each place; -100 where none counts.
            state: of the tokens before, as in `forward`; None at a start.
            cu_seqlens: [N + 1] int32 or int64, bounds of packed sequences, as in `forward`.
            keep_state: whether the new state is wanted; training on packed documents has no use for it.

        Returns:
            sum, num_targets, state, and `mean`, the loss to call `backward()` on.

        Example:
            >>> import torch
            >>> from hgrn2 import HGRN2LM, presets
            >>> model = HGRN2LM(presets.tiny(vocab_size=257))
            >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            >>> tokens = torch.randint(257, (2, 33))
            >>> for step in range(2):
            ...     loss = model.loss(tokens[:, :-1], tokens[:, 1:]).mean
            ...     loss.backward()
            ...     optimizer.step()
            ...     optimizer.zero_grad()
        """
        targets = checked_ids("targets", targets, "[B, T]", self.model.embeddings, IGNORE)
        if targets.shape != input_ids.shape:
            raise UserError(f"targets has shape {list(targets.shape)}; wanted {list(input_ids.shape)}, as input_ids")
        x, state = self.hidden_states(input_ids, state, cu_seqlens, keep_state=keep_state)
        targets = targets.flatten()
        loss = linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets)
        return LossOutput(loss, (targets != IGNORE).sum(), state)

    def step(self, token_ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Reads one token of each sequence.

        Args:
            token_ids: [B] int64.
            state: of the tokens before, from an earlier call or `init_state`.

        Returns:
            logits [B, vocab_size] and the new state.
        """
        token_ids = checked_ids("token_ids", token_ids, "[B]", self.model.embeddings)
        logits, state = self(token_ids.unsqueeze(1), state)
        return logits[:, 0], state

    def generate(
        self,
        input_ids: Tensor,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        *,
        attention_mask: Tensor | None = None,
        stop_ids: Collection[int] = (),
    ) -> Tensor:
        """Continues prompts token by token; needs nothing but torch, and no tokenizer.

        `hgrn2.inference.writing.Writer` goes from text to text and keeps the state for more.

        Args:
            input_ids: [B, T] int64, at least one token each.
            max_tokens: most tokens to add.
            sampling: how tokens are drawn; None for the defaults of `hgrn2.Sampling`.
            attention_mask: [B, T], 0 or False where a shorter prompt is padded on the left.
            stop_ids: ids that end a text. It keeps the id, and repeats it until every text has ended.

        Returns:
            [B, T + N] int64, the prompts and the N <= max_tokens tokens after them.

        Raises:
            UserError: arguments that do not fit, or a model whose outputs are not finite.

        Example:
            >>> import torch
            >>> from hgrn2 import HGRN2LM, Sampling, presets
            >>> model = HGRN2LM(presets.tiny(vocab_size=257))
            >>> model.generate(torch.tensor([[72, 105]]), 5, Sampling(temperature=0)).shape
            torch.Size([1, 7])
        """
        return generate(self, input_ids, max_tokens, sampling, attention_mask, stop_ids)

    @classmethod
    def load(cls, path: str | Path, checkpoint: str = "latest", device: torch.device | str = "auto") -> HGRN2LM:
        """Opens a trained model; `hgrn2.load` opens its tokenizer as well.

        Args:
            path: a run folder, one of its checkpoints, or a folder of any layout that `hgrn2 convert` knows.
            checkpoint: "latest", or "best" for the one with the best validation; of a run folder.
            device: "cpu", "cuda", ...; "auto" takes the first GPU if there is one.

        Returns:
            The model in float32 and evaluation mode.

        Raises:
            UserError: no model there, damaged files, or no such device.
            MissingPackage: a package of the extra "train" is not installed.
        """
        from hgrn2.loading import load_weights

        return load_weights(path, checkpoint, device)

    def save(self, folder: str | Path, tokenizer: Any = None) -> Path:
        """Writes the model into a new folder, which `load`, `hgrn2.load` and every command open.

        Args:
            folder: a folder that does not exist yet; it appears whole or not at all.
            tokenizer: from `hgrn2.load` or `hgrn2.data.load_tokenizer`, to write beside the model.

        Returns:
            The folder.

        Raises:
            UserError: the folder exists or cannot be written.
            MissingPackage: a package of the extra "train" is not installed.
        """
        from hgrn2.loading import save_model

        return save_model(self, folder, tokenizer)

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> ModelState:
        """Makes the state before the first token.

        Args:
            batch_size: number of sequences.
            device: where; None for that of the weights.
        """
        if not isinstance(batch_size, int) or batch_size < 0:
            raise UserError(f"batch_size is {describe(batch_size)}; wanted the number of sequences")
        weight = self.model.embeddings.weight
        device = weight.device if device is None else torch.device(device)
        return ModelState(
            tuple(layer.attn.init_state(batch_size, device, weight.dtype) for layer in self.model.layers)  # pyright: ignore
        )

    def num_parameters(self) -> int:
        """Counts the parameters, a tied matrix once."""
        return sum(p.numel() for p in self.parameters())

    def parameter_roles(self) -> dict[str, str]:
        """Says what each parameter is, by name.

        "matrix" (hidden weights of two axes), "embedding", "head", "vector" (norms, biases, convolutions) or
        "lower_bounds". Weight decay belongs on the first three only.
        """
        roles = {}
        for name, parameter in self.named_parameters():
            if name == "model.embeddings.weight":
                roles[name] = "embedding"
            elif name == "lm_head.weight":
                roles[name] = "head"
            elif name == "model.lower_bounds":
                roles[name] = "lower_bounds"
            else:
                roles[name] = "matrix" if parameter.dim() == 2 else "vector"
        return roles

    @torch.no_grad()
    def gate_statistics(self, input_ids: Tensor, cu_seqlens: Tensor | None = None) -> list[dict[str, Any]]:
        """Measures the forget gates on some text, for looking at a model.

        Args:
            input_ids: [B, T] int64.
            cu_seqlens: [N + 1] int32 or int64, bounds of packed sequences, B = 1; or None.

        Returns:
            For each recurrent layer {"layer": index from 0, "lower_bound": [D], "forget_gate": [B, T, D] float32,
            "state_norm": Frobenius norm of the final state, the mean over sequences and heads}.
        """
        statistics: list[dict[str, Any]] = []
        with self._watch(statistics):
            _, state = self.hidden_states(input_ids, None, cu_seqlens)
        for entry in statistics:
            recurrent = state.layers[entry["layer"]]["recurrent"]
            entry["state_norm"] = float(recurrent.flatten(2).norm(dim=-1).mean())
        return statistics

    @contextmanager
    def _watch(self, statistics: list[dict[str, Any]]) -> Iterator[None]:
        def watch(index: int) -> Any:
            def hook(mixer: HGRN2Mixer, args: tuple[Any, ...]) -> None:
                x, bound, state, cu_seqlens, mask = args
                z = mixer.project(x, state, cu_seqlens, mask)[1].flatten(2)
                shown = torch.zeros(z.shape[-1]) if bound is None else bound
                statistics.append({"layer": index, "lower_bound": shown, "forget_gate": forget_gate(z, bound)})

            return hook

        handles = [
            layer.attn.register_forward_pre_hook(watch(i))  # pyright: ignore
            for i, layer in enumerate(self.model.layers)
            if isinstance(layer.attn, HGRN2Mixer)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
