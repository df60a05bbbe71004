"""A model of any layout written in another, or with its attention replaced."""

from __future__ import annotations

from pathlib import Path

import torch

from hgrn2.formats.convert import Source, Written, convert, parse_size
from hgrn2.formats.opening import open_folder
from hgrn2.formats.run_folder import locate_model, read_while_training
from hgrn2.formats.start import StartSettings, parse_layers, start_from_transformer


def convert_model(
    source: Path, out: Path, to: str, dtype: str, max_shard_size: str, which: str, start: StartSettings | None = None
) -> Written:
    """Write a model in another layout.

    Args:
        source: a run folder, a checkpoint, or a folder of any layout.
        out: a folder that does not exist yet.
        to: name of the layout, a key of `hgrn2.formats.layout.LAYOUTS`.
        dtype: name of a dtype of torch, or "same".
        max_shard_size: maximum size of a weight file, such as "5GB", "500MB" or "2GiB".
        which: "latest" or "best" checkpoint of a run.
        start: put recurrent layers into a Transformer; None to write the model as it is.
    """
    max_shard_bytes = parse_size(max_shard_size)

    def read_and_write() -> Written:
        folder, tokenizer_dir = locate_model(source, which)
        # layers that are kept have their positions read when it is known which they are
        opened = open_folder(folder, attends=start is None)
        model: Source = opened
        if start is not None:
            model = start_from_transformer(
                opened, keep_attention=parse_layers(start.keep_attention or "none", opened.config.num_hidden_layers),
                expand_ratio=start.expand_ratio, copy_qv=start.copy_qv, seed=start.seed,
            )  # fmt: skip
        return convert(
            model, out, to, tokenizer_dir=tokenizer_dir,
            dtype=None if dtype == "same" else getattr(torch, dtype), max_shard_bytes=max_shard_bytes,
        )  # fmt: skip

    return read_while_training(source, read_and_write)
