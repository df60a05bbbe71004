"""`hgrn2 convert`: write a checkpoint in another layout."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Literal

import tyro

from hgrn2.cli.command import Command
from hgrn2.errors import UserError
from hgrn2.formats.card import opening_lines
from hgrn2.formats.convert_model import convert_model
from hgrn2.formats.layout import LAYOUTS
from hgrn2.formats.start import StartSettings
from hgrn2.train.display import size

# the layouts that can be written
_NAMES = tuple(name for name, layout in LAYOUTS.items() if layout.architecture is not None)
LayoutName = Literal[_NAMES]  # pyright: ignore[reportInvalidTypeForm]


def convert(
    source: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    to: LayoutName | None = None,  # pyright: ignore[reportInvalidTypeForm]
    dtype: Literal["same", "float32", "bfloat16", "float16"] = "same",
    max_shard_size: str = "5GB",
    checkpoint: Literal["latest", "best"] = "latest",
    from_transformer: bool = False,
    keep_attention: str | None = None,
    expand_ratio: int | None = None,
    copy_qv: bool = False,
    seed: int = 0,
) -> None:
    """Write a checkpoint in another layout, or start from a Transformer.

    The layout of SOURCE is recognised from its files.

    Args:
        source: A run folder, a checkpoint, or a folder in the layout of hgrn2.hf, fla, hgru2-pytorch or a Transformer.
        out: A folder that does not exist yet; it appears whole or not at all.
        to: hf (transformers, after import hgrn2.hf), fla, native (as runs are kept) or official (hgru2-pytorch);
            a start from a Transformer is written as hf unless named.
        dtype: Precision of the new tensors; same keeps that of each.
        max_shard_size: Weights above this size are cut into several files; native is always one.
        checkpoint: Which checkpoint of a run.
        from_transformer: Put new recurrent layers into a Transformer (Llama, Mistral, Qwen2); the rest is copied.
        keep_attention: Layers that stay as they are: 3,7,11, every:4 (the last of each four), all or none.
        expand_ratio: Width of a head of the recurrent layers (default: that of the Transformer's heads).
        copy_qv: Start the recurrent layers' q and i from the attention's q and v.
        seed: Draws the weights of the new layers.
    """
    start = StartSettings(keep_attention, expand_ratio, copy_qv, seed)
    if not from_transformer and start != StartSettings():
        raise UserError(
            "--keep-attention, --expand-ratio, --copy-qv and --seed go with --from-transformer", "contradiction"
        )
    if to is None and not from_transformer:
        raise UserError(f"--to is missing; wanted {' or '.join(_NAMES)}", "incomplete")
    written = convert_model(
        source, out, to or "hf", dtype, max_shard_size, checkpoint, start if from_transformer else None
    )
    files = "" if written.num_shards == 1 else f" in {written.num_shards} files"
    print(f"{written.path}: {written.num_tensors} tensors, {size(written.num_bytes)}{files}")
    if (to or "hf") == "hf":
        print(f"opens in Python with\n{textwrap.indent(opening_lines(str(written.path)), '    ')}")


COMMAND = Command("convert", convert, order=50, aliases=("export", "import", "save"))
