"""Our model and the transformers class with the same weights."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import TrainingArguments

from hgrn2.hf import HGRN2Config, HGRN2ForCausalLM
from hgrn2.models import HGRN2LM
from tests.models.cases import config_of, make_model, tokens

# the models whose caches differ in kind: a state, a state and convolutions, keys that grow, keys in a window, and a
# pattern with a mixer from outside
KINDS = ["fla", "short-conv", "dense-signed", "full-attention", "window-attention", "average-hybrid"]
__all__ = ["KINDS", "Texts", "arguments", "both", "continued", "hf_config", "left_padded", "losses", "tokens"]


def hf_config(name: str, **keys) -> HGRN2Config:
    return HGRN2Config(**(config_of(name).to_dict() | keys))


def both(name: str, dtype: torch.dtype = torch.float64, **keys) -> tuple[HGRN2LM, HGRN2ForCausalLM]:
    own = make_model(config_of(name), dtype)
    model = HGRN2ForCausalLM(hf_config(name, **keys)).to(dtype).eval()
    model.load_state_dict(own.state_dict())
    return own, model


@torch.no_grad()
def continued(own: HGRN2LM, ids: Tensor, count: int) -> Tensor:
    """The plain loop: the likeliest token, all of the text read again for each."""
    for _ in range(count):
        ids = torch.cat([ids, own(ids)[0][:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def left_padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Ids and mask of some texts, the shorter ones filled up on the left."""
    longest = max(lengths)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return tokens(len(lengths), longest), mask


class Texts(torch.utils.data.Dataset):
    """Texts with a pattern to learn: each token is the one before plus three."""

    def __init__(self, count, length=12, labels=True):
        start = torch.arange(count) % 29
        self.ids = (start[:, None] + 3 * torch.arange(length)) % 29
        self.labels = labels

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        ids = self.ids[i].tolist()
        return {"input_ids": ids, **({"labels": ids} if self.labels else {})}


def arguments(folder, **keys):
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=1, learning_rate=3e-2, report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="no", logging_steps=1, lr_scheduler_type="constant", **keys,
    )  # fmt: skip


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
