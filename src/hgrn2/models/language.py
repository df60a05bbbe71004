"""The language model: logits, losses, single steps, generation, loading and saving."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hgrn2.errors import UserError
from hgrn2.models.body import HGRN2Model
from hgrn2.models.config import HGRN2Config
from hgrn2.models.generation import generate
from hgrn2.models.inputs import check_mixers, check_pieces, check_state, checked_ids, checked_mask
from hgrn2.models.outputs import LossOutput
from hgrn2.models.sampling import Sampling
from hgrn2.models.state import ModelState
from hgrn2.models.statistics import gate_statistics
from hgrn2.nn.loss import IGNORE, linear_cross_entropy
from hgrn2.nn.mixers.base import Context, StateSpec
from hgrn2.nn.parameters import SkippedDraws, draw, parameter_roles
from hgrn2.ops import check_backend
from hgrn2.ops.checks import check_cu_seqlens
from hgrn2.ops.pieces import Pieces
from hgrn2.shapes import describe


class HGRN2LM(nn.Module):
    """A causal language model.

    All ways to run it give the same results: a whole prompt, the prompt in pieces with the state passed on, token by
    token, packed with other sequences, or left-padded in a batch with longer ones.

    Args:
        config: configuration of the model.
        backend: name of the operators' backend ("triton", "chunked", ...), or "auto" to choose one per call.

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
        with SkippedDraws():
            self.model = HGRN2Model(config, backend)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        if not self.lm_head.weight.is_meta:
            self.initialize()

    @property
    def activation_checkpointing(self) -> bool:
        """Whether the backward pass recomputes the activations of every layer instead of storing them.

        Training then needs less memory and about a third more time; losses and gradients are bitwise the same.
        """
        return self.model.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self.model.activation_checkpointing = on

    def tie_weights(self) -> None:
        """Share one parameter between head and embeddings if the config ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embeddings.weight

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw initial weights.

        | parameters | distribution |
        | --- | --- |
        | embeddings, head, projections, convolutions | normal, standard deviation `initializer_range` |
        | o_proj and down_proj (the ends of the 2 L residual branches) | the same, divided by sqrt(2 L) |
        | norm weights | 1 |
        | biases, lower_bounds | 0 (so that layer l starts at a bound of l / L) |

        Mixers other than HGRN2 and attention initialise their parameters in `hgrn2.nn.mixers.Mixer.reset_parameters`.

        Args:
            generator: source of the random numbers; None for torch's global one.
        """
        std = self.config.initializer_range
        self.model.reset_parameters(std, generator)
        if self.lm_head.weight is not self.model.embeddings.weight:
            draw(self.lm_head, std, generator)

    def forward(
        self,
        input_ids: Tensor,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        targets: Tensor | None = None,
        keep_state: bool = True,
        pieces: Pieces | None = None,
    ) -> Any:
        """Compute the logits of the next token at every place, or with `targets` the loss.

        Args:
            input_ids: [B, T] int64.
            state: state after the tokens before, from an earlier call or `init_state`; None at the start of a sequence.
            cu_seqlens: [N + 1] int32 or int64: sequences packed end to end, B = 1; state then holds N sequences.
            attention_mask: [B, T], 0 or False where a token is padding; pad on the left to use the last logits.
            targets: [B, T] int64, to get the result of `loss`. Wrappers that hook the call of a model, such as
                DistributedDataParallel, need this form.
            keep_state: whether to return the new state.
            pieces: how the sequences are split over ranks, of which input_ids is a piece; state must then be None.

        Returns:
            logits [B, T, vocab_size] and the new state; with targets a `LossOutput`.

        Raises:
            UserError: a mask is given with packed sequences, or ids have the wrong shape.
        """
        if targets is not None:
            targets = self._check_targets(targets, input_ids)
        x, state = self.hidden_states(input_ids, state, cu_seqlens, attention_mask, keep_state, pieces)
        if targets is None:
            return self.lm_head(x), state
        targets = targets.flatten()
        loss = linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets)
        return LossOutput(loss, (targets != IGNORE).sum(), state)

    def _check_targets(self, targets: Tensor, input_ids: Tensor) -> Tensor:
        targets = checked_ids("targets", targets, "[B, T]", self.model.embeddings, IGNORE)
        if targets.shape != input_ids.shape:
            raise UserError(
                f"targets has shape {list(targets.shape)}; wanted {list(input_ids.shape)}, as input_ids",
                "contradiction",
            )
        return targets

    def hidden_states(
        self,
        input_ids: Tensor,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        keep_state: bool = True,
        pieces: Pieces | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Compute the hidden states, the inputs of the head.

        Args:
            input_ids: [B, T] int64.
            state: state after the tokens before, from an earlier call or `init_state`; None at the start of a sequence.
            cu_seqlens: [N + 1] int32 or int64, bounds of packed sequences, B = 1.
            attention_mask: [B, T], 0 or False where a token is padding.
            keep_state: whether to return the new state; otherwise the returned state has no tensors.
            pieces: how the sequences are split over ranks, of which input_ids is a piece; no state is returned.

        Returns:
            Hidden states [B, T, D] after the last norm, and the new state.
        """
        input_ids = checked_ids("input_ids", input_ids, "[B, T]", self.model.embeddings)
        if attention_mask is not None:
            if cu_seqlens is not None:
                raise UserError(
                    "attention_mask and cu_seqlens were both given; packed sequences have no padding, drop the mask",
                    "contradiction",
                )
            attention_mask = checked_mask(attention_mask, input_ids)
        num_sequences = input_ids.shape[0]
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, input_ids, False, "input_ids")
            num_sequences = cu_seqlens.shape[0] - 1
        if state is not None:
            check_state(state, len(self.model.layers), num_sequences, self.model.embeddings)
        check_mixers(self.config.layers or (), cu_seqlens, attention_mask)
        if pieces is not None:
            check_pieces(self.model.layers, pieces.ranks.count, state, attention_mask)
            keep_state = False
        # one token after a state is a step; a dynamic length of an exported program is not
        is_single = isinstance(input_ids.shape[1], int) and input_ids.shape[1] == 1
        is_step = state is not None and is_single and cu_seqlens is None
        context = Context(cu_seqlens, attention_mask, keep_state, is_step, pieces=pieces)
        return self.model(input_ids, state, context)

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,
        keep_state: bool = True,
        pieces: Pieces | None = None,
    ) -> LossOutput:
        """Compute the cross entropy of the next tokens without storing all logits at once.

        Args:
            input_ids: [B, T] int64.
            targets: [B, T] int64, the token that follows each place; -100 to ignore a place.
            state: state after the tokens before, from an earlier call or `init_state`; None at the start of a sequence.
            cu_seqlens: [N + 1] int32 or int64, bounds of packed sequences, B = 1.
            keep_state: whether to return the new state; training on packed documents does not need it.
            pieces: how the sequences are split over ranks, of which input_ids is a piece; sum and num_targets are then
                those of the piece.

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
        if targets is None:
            raise UserError("targets is None; wanted a tensor [B, T] of int64")
        return self(input_ids, state, cu_seqlens, targets=targets, keep_state=keep_state, pieces=pieces)

    def step(self, token_ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Run one token of each sequence.

        Args:
            token_ids: [B] int64.
            state: state after the tokens before, from an earlier call or `init_state`.

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
        """Continue prompts token by token; needs nothing but torch, and no tokenizer.

        `hgrn2.inference.writing.Writer` continues text, and keeps the state to continue further.

        Args:
            input_ids: [B, T] int64, at least one token each.
            max_tokens: maximum number of tokens to add.
            sampling: settings of the sampling; None for the defaults of `hgrn2.Sampling`.
            attention_mask: [B, T], 0 or False where a shorter prompt is padded on the left.
            stop_ids: ids that end a text. The id is kept, and repeated until every text has ended.

        Returns:
            [B, T + N] int64: the prompts, followed by N <= max_tokens tokens.

        Raises:
            UserError: an argument is invalid, or the outputs of the model are not finite.

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
        """Open a trained model; `hgrn2.load` opens its tokenizer as well.

        Args:
            path: a run folder, one of its checkpoints, or a folder in any layout that `hgrn2 convert` reads.
            checkpoint: of a run folder, "latest", or "best" for the one with the best validation.
            device: "cpu", "cuda", ...; "auto" takes the first GPU if there is one.

        Returns:
            The model in float32 and evaluation mode.

        Raises:
            UserError: there is no model, a file is damaged, or the device does not exist.
            MissingPackage: a package of the extra "train" is not installed.
        """
        from hgrn2.loading import load_weights

        return load_weights(path, checkpoint, device)

    def save(self, folder: str | Path, tokenizer: Any = None) -> Path:
        """Write the model into a new folder that `load`, `hgrn2.load` and every command can open.

        Args:
            folder: a folder that does not exist yet; it appears complete, or not at all.
            tokenizer: tokenizer from `hgrn2.load` or `hgrn2.data.load_tokenizer`, to write next to the model.

        Returns:
            The folder.

        Raises:
            UserError: the folder exists or cannot be written.
            MissingPackage: a package of the extra "train" is not installed.
        """
        from hgrn2.loading import save_model

        return save_model(self, folder, tokenizer)

    def init_state(self, batch_size: int, device: torch.device | str | None = None) -> ModelState:
        """Return the state before the first token.

        Args:
            batch_size: number of sequences.
            device: device of the state; None for that of the weights.
        """
        if not isinstance(batch_size, int) or batch_size < 0:
            raise UserError(f"batch_size is {describe(batch_size)}; wanted the number of sequences")
        device = self.model.embeddings.weight.device if device is None else torch.device(device)
        return ModelState(
            tuple({name: spec.zeros(batch_size, device) for name, spec in specs.items()} for specs in self.state_spec())
        )

    def state_spec(self) -> list[dict[str, StateSpec]]:
        """Return the shapes and dtypes of each layer's state by name, for inputs in the dtype of the embeddings."""
        dtype = self.model.embeddings.weight.dtype
        return [layer.attn.state_spec(dtype) for layer in self.model.layers]  # pyright: ignore

    def num_parameters(self) -> int:
        """Return the number of parameters; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def parameter_roles(self) -> dict[str, str]:
        """Return the role of each parameter, by name.

        "matrix" (weights of projections), "embedding", "head", "vector" (norms, biases, convolutions and other
        parameters of mixers) or "lower_bounds". Only the first three should have weight decay.
        """
        roles = parameter_roles(self) | {"lm_head.weight": "head"}
        # a tied head is not a separate parameter
        return {name: roles[name] for name, _ in self.named_parameters()}

    def gate_statistics(self, input_ids: Tensor, cu_seqlens: Tensor | None = None) -> list[dict[str, Any]]:
        """Measure the forget gates on some text.

        Args:
            input_ids: [B, T] int64.
            cu_seqlens: [N + 1] int32 or int64, bounds of packed sequences, B = 1; or None.

        Returns:
            For each recurrent layer {"layer": index from 0, "lower_bound": [D], "forget_gate": [B, T, D] float32,
            "state_norm": Frobenius norm of the final state, averaged over sequences and heads}.
        """
        return gate_statistics(self, input_ids, cu_seqlens)
