"""`hgrn2 info`: show what a model costs."""

from __future__ import annotations

import torch
import tyro
from rich.markup import escape
from rich.table import Table

from hgrn2.cli.command import Command
from hgrn2.cli.model_config import model_config
from hgrn2.cli.output import show_table
from hgrn2.cli.parsing import Texts
from hgrn2.errors import UserError
from hgrn2.models import HGRN2Config
from hgrn2.models.cost import cost, cost_table
from hgrn2.models.memory import memory_plans
from hgrn2.models.presets import PRESETS
from hgrn2.quantities import plural
from hgrn2.train.display import size

# of a GPU that is not here
_GPU_GIB = 80.0
# the rest is for kernels, the loss and fragments
_USABLE = 0.9


def info(
    model: tyro.conf.Positional[str | None] = None,
    seq_len: int = 2048,
    set: Texts = (),
    gpus: int | None = None,
    batch_size: int | None = None,
    gpu_gib: float | None = None,
) -> None:
    """Show what a model costs: parameters, operations, memory.

    Args:
        model: A preset, a run folder, a checkpoint, or a JSON file of a model's configuration; without one, the
            presets are listed.
        seq_len: Tokens of a training sequence.
        set: Model settings as KEY=VALUE.
        gpus: Show what training on so many GPUs takes of the memory of each.
        batch_size: With --gpus: sequences of a forward pass on all of them together (default: one per GPU).
        gpu_gib: With --gpus: memory of a GPU in GiB (default: that of the first GPU here, or 80).
    """
    if seq_len < 1:
        raise UserError(f"--seq-len is {seq_len}; wanted at least 1")
    if model is None:
        if set or gpus is not None:
            raise UserError("--set and --gpus are about one model; name it before them", "incomplete")
        show_table(_presets())
        return
    config = model_config(model, {}, set, None)
    table = Table("", "value", "", title=f"{escape(model)}: {config.summary}")
    table.columns[1].justify = "right"
    for name, layers in config.described_layers.items():
        table.add_row(f"layers with {name}", str(config.layer_mixers.count(name)), layers)
    for line in cost_table(config, seq_len):
        value = size(line.value) if line.unit == "bytes" else f"{line.value:,}"
        table.add_row(line.label, value, line.note)
    show_table(table)
    if gpus is None and (batch_size is not None or gpu_gib is not None):
        raise UserError("--batch-size and --gpu-gib say how GPUs are used; give --gpus", "incomplete")
    if gpus is not None:
        show_table(_memory(config, gpus, seq_len, gpus if batch_size is None else batch_size, gpu_gib))


def _memory(config: HGRN2Config, gpus: int, seq_len: int, batch_size: int, gpu_gib: float | None) -> Table:
    """Return a table of the memory on each GPU."""
    for name, value in (("gpus", gpus), ("batch-size", batch_size), ("gpu-gib", gpu_gib)):
        if value is not None and not value > 0:
            raise UserError(f"--{name} is {value}; wanted more than 0")
    if gpu_gib is None:
        is_here = torch.cuda.is_available()
        gpu_gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if is_here else _GPU_GIB
    what = f"{plural(gpus, 'GPU')} of {gpu_gib:.0f} GiB, {batch_size:,} x {seq_len:,} tokens, bfloat16: GiB on each"
    table = Table("settings", "weights", "grads", "AdamW", "activ.", "total", "fits", title=what)
    table.columns[0].no_wrap = True
    for column in table.columns[1:6]:
        column.justify = "right"
    for plan in memory_plans(config, gpus, batch_size * seq_len, seq_len):
        parts = (plan.weights, plan.gradients, plan.optimizer, plan.activations, plan.total)
        fits = plan.total <= _USABLE * gpu_gib * 2**30
        names = plan.settings.split() or ["(default)"]
        table.add_row("\n".join(names), *(f"{part / 2**30:.1f}" for part in parts), "yes" if fits else "no")
    return table


def _presets() -> Table:
    table = Table("preset", "parameters", "layers", "width", "heads", "vocabulary", title="presets")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, preset in PRESETS.items():
        config = preset()
        table.add_row(
            name, f"{cost(config).parameters:,}", str(config.num_hidden_layers), f"{config.hidden_size:,}",
            f"{config.num_heads} of {config.expand_ratio}", f"{config.vocab_size:,}",
        )  # fmt: skip
    return table


COMMAND = Command("info", info, order=40, aliases=("show", "list", "models", "presets", "describe", "params", "cost"))
