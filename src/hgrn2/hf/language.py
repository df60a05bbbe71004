"""Causal language model with the interface of transformers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from hgrn2.errors import UserError
from hgrn2.hf.cache import CACHE_NAME
from hgrn2.hf.configuration import HGRN2Config
from hgrn2.hf.modeling import HGRN2Model, HGRN2PreTrainedModel, places_read
from hgrn2.nn.loss import IGNORE, linear_cross_entropy


class HGRN2ForCausalLM(HGRN2PreTrainedModel, GenerationMixin):
    """`hgrn2.models.HGRN2LM` with transformers' arguments and outputs; parameter names are the same.

    Args:
        config: the model's configuration.

    Example:
        >>> import torch
        >>> from hgrn2.hf import HGRN2Config, HGRN2ForCausalLM
        >>> config = HGRN2Config(vocab_size=50, hidden_size=16, expand_ratio=8, num_hidden_layers=2)
        >>> model = HGRN2ForCausalLM(config).eval()
        >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: HGRN2Config) -> None:
        super().__init__(config)
        self.model = HGRN2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    @staticmethod
    def create_masks_for_generate(
        inputs_embeds: Tensor, attention_mask: Tensor | None, is_first_iteration: bool = False, **_: Any
    ) -> Tensor | None:
        """Return the mask of the new places for a cache of fixed size, [B, T], or None.

        The cache knows about the places before. A single token after the prompt is never padding, and None keeps the
        shapes of a compiled step constant; PEFT's prompt tuning would make a mask wider by its virtual tokens, which
        the cache has read by then.

        Args:
            inputs_embeds: [B, T, ...], for its shape.
            attention_mask: [B, S + T] or None.
            is_first_iteration: whether this is the prompt or a piece of it.
        """
        length = inputs_embeds.shape[1]
        if attention_mask is None or (length == 1 and not is_first_iteration):
            return None
        return attention_mask[:, attention_mask.shape[1] - length :]

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        # replace the layers first: generation asks the cache how many places it has read
        made = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # pyright: ignore
        if model_kwargs.get(CACHE_NAME) is not None:
            self.model.state_layers(model_kwargs[CACHE_NAME])
        return made

    # the library inspects the signature
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # pyright: ignore[reportAttributeAccessIssue]
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of a step."""
        # given for stop strings; not an argument of the model
        kwargs.pop("tokenizer", None)
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        # PEFT looks for the cache under this name in every version; otherwise it would insert virtual tokens again
        if CACHE_NAME in inputs:
            inputs["past_key_values"] = inputs.pop(CACHE_NAME)
        return inputs

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if model_kwargs.get("inputs_embeds") is not None and generation_config.prefill_chunk_size is not None:
            raise UserError(
                "prefill_chunk_size: transformers cuts ids into pieces, not inputs_embeds; leave one out",
                "contradiction",
            )
        # the library slices by these numbers without a check; it stores a mask of ones as a number
        read = places_read(model_kwargs.get(CACHE_NAME))
        mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
        width = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        given = (input_ids if embeds is None else embeds).shape[1]
        new_alone = embeds is None and width > given
        if read and (width != read + given if new_alone else given <= read):
            raise UserError(
                f"the cache has read {read} places, and {given} are given"
                + (f", with an attention_mask of {width}" if new_alone else "")
                + "; give the whole text, what was read included, or what is new alone with an attention_mask of "
                f"{read} + {given} places (generation does not read the last token that it writes)",
                "contradiction",
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # pyright: ignore

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        cu_seq_lens_q: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits of the next token at every place, and a loss.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], or [B, S + T] after S places that the cache has read; 0 where a place is padding.
            cache: cache of the places before, as an earlier call returned it; updated in place.
            inputs_embeds: [B, T, D], outputs of the embeddings, instead of input_ids.
            labels: [B, T] int64, the tokens themselves (they are shifted here); -100 at places to ignore.
            use_cache: whether to return a cache, by default as in `HGRN2Model.forward`.
            output_hidden_states: whether to return the input of every layer and the output of the model below the head.
            logits_to_keep: number of last places whose logits are returned, 0 for all; or a 1-D tensor of places. The
                loss covers all places in any case and never holds all logits, so 1 saves memory in training.
            num_items_in_batch: divisor of the summed loss, instead of the number of labels that are not ignored.
            cu_seq_lens_q: [N + 1] starts of sequences packed end to end and the total length, B = 1. The first token
                of a sequence is not a label of the sequence before.
            past_key_values: the cache by its name before transformers 5.24.
            **kwargs: further arguments of `HGRN2Model.forward`, and shift_labels [B, T], labels that are shifted
                already. They take precedence over labels: the Trainer gives both if it splits a sequence over devices.

        A function assigned to `loss_function` is called as transformers calls it, with the logits of all places,
        labels, vocab_size and the further arguments; in labels of packed sequences, the first tokens are ignored.

        Returns:
            The loss or None, logits [B, kept, vocab_size], and what `HGRN2Model.forward` returns.
        """
        # in kwargs, because the Trainer expects named arguments with "label" in every batch
        shift_labels = kwargs.pop("shift_labels", None)
        labels = _without_first_tokens(labels, cu_seq_lens_q)
        targets = shift_labels if shift_labels is not None or labels is None else _shifted(labels)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids,
            attention_mask,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cu_seq_lens_q=cu_seq_lens_q,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        x = outputs.last_hidden_state
        assert x is not None
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss = None
        if targets is not None:
            if targets.shape != x.shape[:2]:
                raise UserError(
                    f"labels have shape {list(targets.shape)}; wanted {list(x.shape[:2])}, as the input",
                    "contradiction",
                )
            if self.loss_function is ForCausalLMLoss:
                loss = self._summed_loss(x.flatten(0, 1), targets.flatten().to(x.device))
                loss = loss / _count(targets, num_items_in_batch, loss.device)
            else:
                given = {"shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch, **kwargs}
                given = {name: value for name, value in given.items() if value is not None}
                vocab_size = self.config.vocab_size
                loss = self.loss_function(logits=self.lm_head(x), labels=labels, vocab_size=vocab_size, **given)
        return CausalLMOutputWithPast(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=self.lm_head(x[:, kept]),
            hidden_states=outputs.hidden_states,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},  # pyright: ignore[reportArgumentType]
        )

    def _summed_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the summed cross entropy of x [M, D]; without all logits if the head is a plain matrix."""
        head = self.lm_head
        # adapters, quantised weights and offloaded weights take effect only in a call
        if type(head) is nn.Linear and head.bias is None and not hasattr(head, "_hf_hook"):
            return linear_cross_entropy(x, head.weight, targets)
        logits = head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


def _without_first_tokens(labels: Tensor | None, bounds: Tensor | None) -> Tensor | None:
    """Return the labels with the first of each packed sequence ignored, as no token of the sequence predicts it."""
    if labels is None or bounds is None:
        return labels
    labels = labels.clone()
    starts = bounds[:-1].long()
    labels[:, starts[starts < labels.shape[1]]] = IGNORE
    return labels


def _shifted(labels: Tensor) -> Tensor:
    """Return the label of the next place, for each place."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORE)


def _count(targets: Tensor, num_items: Tensor | int | None, device: torch.device) -> Tensor | int:
    if num_items is None:
        return (targets != IGNORE).sum().to(device)
    return num_items.to(device) if isinstance(num_items, Tensor) else num_items
