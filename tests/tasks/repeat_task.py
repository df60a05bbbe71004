"""A task in one file, which no file of the package knows: say the symbol of three steps ago again."""

import dataclasses
from typing import Annotated

import torch
from torch.nn import functional

from hgrn2.constraints import Ge
from hgrn2.tasks import Metric, ReportFigure, StepLoss, TaskBase, TaskOptions, TaskReport


@dataclasses.dataclass(frozen=True)
class RepeatOptions(TaskOptions):
    num_symbols: Annotated[int, Ge(2)] = 4


class Repeat(TaskBase):
    name, Options, metric = "repeat", RepeatOptions, Metric("val_accuracy", higher_is_better=True)
    report = TaskReport(figures=(ReportFigure("val_accuracy", "accuracy", ".0%", "of symbols", ".1%"),))

    def __init__(self, options, context):
        self.options, self.context, self.position = options, context, 0

    build = classmethod(lambda cls, options, context: cls(options, context))
    model_settings = classmethod(lambda cls, options: {"vocab_size": options.num_symbols})

    def batch(self, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.options.num_symbols, (self.context.batch_size, 12), generator=generator)

    def next_batch(self):
        self.position += 1
        return self.batch(self.position)

    def num_tokens(self, batch):
        return batch.numel()

    def num_targets(self, batch):
        return batch[:, 3:].numel()

    def loss(self, model, batch):
        logits, targets = model(batch)[0][:, 3:].flatten(0, 1), batch[:, :-3].flatten()
        correct = (logits.argmax(-1) == targets).sum()
        return StepLoss(functional.cross_entropy(logits, targets, reduction="sum"), {"accuracy": correct})

    def evaluate(self, model):
        batch = self.batch(0)
        loss_sum, sums = self.loss(model, batch)
        n = self.num_targets(batch)
        return {"val_loss": loss_sum.item() / n, "val_accuracy": sums["accuracy"].item() / n}

    def state_dict(self):
        return {"position": self.position}

    def load_state(self, state, tensors):
        self.position = state["position"]
