"""`hgrn2 info`: show what a model costs."""

from __future__ import annotations

import tyro
from rich.markup import escape
from rich.table import Table

from hgrn2.cli.command import Command
from hgrn2.cli.model_config import model_config
from hgrn2.cli.output import show_table
from hgrn2.cli.parsing import Texts
from hgrn2.errors import UserError
from hgrn2.models.cost import cost, cost_table
from hgrn2.models.presets import PRESETS
from hgrn2.train.display import size


def info(model: tyro.conf.Positional[str | None] = None, seq_len: int = 2048, set: Texts = ()) -> None:
    """Show what a model costs: parameters, operations, memory.

    Args:
        model: A preset, a run folder, a checkpoint, or a JSON file of a model's configuration; without one, the
            presets are listed.
        seq_len: Tokens of a training sequence.
        set: Model settings as KEY=VALUE.
    """
    if seq_len < 1:
        raise UserError(f"--seq-len is {seq_len}; wanted at least 1")
    if model is None:
        if set:
            raise UserError("--set changes a model; name one before it", "incomplete")
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
