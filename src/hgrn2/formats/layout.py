"""The known layouts, and recognition of the layout of a config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hgrn2.errors import UserError
from hgrn2.formats import fla, native, official, transformer
from hgrn2.formats.tables import Table
from hgrn2.models import HGRN2Config
from hgrn2.models.config import MODEL_TYPE


@dataclass(frozen=True)
class Layout:
    """A checkpoint layout: how to recognise, read and write it.

    Attributes:
        name: the name for `hgrn2 convert --to`.
        title: the name in messages.
        signature: keys of config.json that no other layout has.
        read_config: converts its config.json to our configuration.
        write_config: converts our configuration to its config.json.
        tables: maps our configuration and tensor names to tables, which say which of our tensors each tensor of a file
            holds. The first table is used for writing.
        architecture: the class of transformers that opens it; None for a layout that is not written.
        derived: suffixes of tensors that follow from the settings and are optional in a file.
    """

    name: str
    title: str
    signature: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], HGRN2Config]
    write_config: Callable[[HGRN2Config], dict[str, Any]]
    tables: Callable[[HGRN2Config, Sequence[str]], tuple[Table, ...]]
    architecture: str | None = None
    derived: tuple[str, ...] = ()


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "native", "a run", (native.TABLE,), native.read_run_config, native.write_run_config, native.tables,
            "HGRN2ForCausalLM",
        ),
        Layout(
            "hf", "hgrn2.hf", native.SIGNATURE, native.read_config, native.write_config, native.tables,
            "HGRN2ForCausalLM",
        ),
        Layout(
            "fla", "fla", fla.SIGNATURE, fla.read_config, fla.write_config, fla.tables, "HGRN2ForCausalLM"
        ),
        Layout(
            "official", "hgru2-pytorch", official.SIGNATURE, official.read_config, official.write_config,
            official.tables, "Hgrn2ForCausalLM",
        ),
    )
}  # fmt: skip


def _cannot_write(config: HGRN2Config) -> dict[str, Any]:
    raise UserError(
        f"the layout of Transformers can be read but not written ({config.num_hidden_layers} layers)", "unsupported"
    )


# recognised by the model type; read, never written
TRANSFORMER = Layout(
    transformer.NAME, "a Transformer", (), transformer.read_config, _cannot_write, transformer.tables,
    derived=transformer.DERIVED,
)  # fmt: skip


def recognise(values: Mapping[str, Any]) -> Layout:
    """Return the layout of a config.json: a Transformer's by its model type, ours by unique keys.

    Raises:
        UserError: unknown model type, no unique key, or keys of two layouts.
    """
    found = values.get("model_type", MODEL_TYPE)
    if found in transformer.MODEL_TYPES:
        return TRANSFORMER
    if found != MODEL_TYPE:
        others = ", ".join(transformer.READ)
        raise UserError(
            f"model_type is {found!r}; wanted {MODEL_TYPE!r}, or of a Transformer one of {others}", "unsupported"
        )
    told = {name: [key for key in layout.signature if key in values] for name, layout in LAYOUTS.items()}
    told = {name: keys for name, keys in told.items() if keys}
    if len(told) > 1:
        keys = " and ".join(f"{keys[0]} of {LAYOUTS[name].title}" for name, keys in told.items())
        raise UserError(
            f"keys of more than one layout, {keys}; remove those that do not belong to this model", "contradiction"
        )
    if not told:
        some = ", ".join(f"{layout.signature[0]!r} ({layout.title})" for layout in LAYOUTS.values())
        raise UserError(f"no key identifies its layout, such as {some}; use the config.json of the model", "unreadable")
    return LAYOUTS[next(iter(told))]
