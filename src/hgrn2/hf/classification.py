"""Text classifier with the interface of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple

from hgrn2.errors import UserError
from hgrn2.hf.cache import CACHE_NAME
from hgrn2.hf.configuration import HGRN2Config
from hgrn2.hf.modeling import HGRN2Model, HGRN2PreTrainedModel


class HGRN2ForSequenceClassification(HGRN2PreTrainedModel):
    """A text classifier: a linear layer on the hidden state of the last token.

    Args:
        config: the model's configuration; `num_labels` or `id2label` say how many classes there are (by default 2;
            with 1 the model predicts a number), and `problem_type` which loss is meant (by default it follows from the
            labels).

    Raises:
        UserError: num_labels is 0.
    """

    def __init__(self, config: HGRN2Config) -> None:
        super().__init__(config)
        if not config.num_labels:
            raise UserError(f"num_labels is {config.num_labels}; wanted at least 1, or names of classes as id2label")
        # the library's loss reads this attribute
        self.num_labels: int = config.num_labels
        self.model = HGRN2Model(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

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
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Compute the scores of each class.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], 0 where a place is padding, on either side. Without it, the tokens after the last
                that is not `pad_token_id` are padding.
            cache: cache of the places before, as an earlier call returned it; updated in place.
            inputs_embeds: [B, T, D], outputs of the embeddings, instead of input_ids.
            labels: [B] classes or, for regression, numbers; [B, num_labels] for several classes per text.
            use_cache: whether to return a cache, by default as in `HGRN2Model.forward`.
            output_hidden_states: whether to return the input of every layer and the output of the model below the head.
            past_key_values: the cache by its name before transformers 5.24.
            **kwargs: further arguments of `HGRN2Model.forward`.

        Returns:
            The loss or None, logits [B, num_labels], and what `HGRN2Model.forward` returns.

        Raises:
            UserError: there are several texts, and neither a mask nor a padding id tells where each ends.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids,
            attention_mask,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        x = outputs.last_hidden_state
        assert x is not None
        last = _last_places(input_ids, attention_mask, self.config.pad_token_id, x)
        logits = self.score(x[torch.arange(x.shape[0], device=x.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},  # pyright: ignore[reportArgumentType]
        )


def _last_places(input_ids: Tensor | None, mask: Tensor | None, pad: int | None, x: Tensor) -> Tensor:
    """Return the index of each row's last token, [B]."""
    batch, length = x.shape[:2]
    if mask is not None:
        tokens = mask[:, mask.shape[1] - length :].to(x.device).bool()
    elif input_ids is not None and pad is not None:
        tokens = (input_ids != pad).to(x.device)
    elif batch == 1:
        tokens = torch.ones((1, length), dtype=torch.bool, device=x.device)
    else:
        asked = "give one" if input_ids is None else "give one, or set pad_token_id in the configuration"
        raise UserError(
            f"several texts without an attention_mask, so the last token of each is unknown; {asked}", "incomplete"
        )
    return (tokens * torch.arange(length, device=x.device)).argmax(-1)
