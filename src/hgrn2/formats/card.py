"""The model card of a folder for transformers: a description of the model and the code that opens it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hgrn2.formats.native import task_name
from hgrn2.models import HGRN2Config
from hgrn2.models.config import MODEL_TYPE
from hgrn2.models.cost import cache_costs, cost
from hgrn2.quantities import plural

CARD_NAME = "README.md"
# metadata of the Hub: lines between two rows of dashes at the top of a card
_METADATA = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_LICENSE = re.compile(r"^license:[ \t]*['\"]?([\w.+-]+)['\"]?[ \t]*$", re.MULTILINE)


def opening_lines(folder: str) -> str:
    """Return the two lines of Python that open a folder.

    Args:
        folder: the path to use in the code.

    Example:
        >>> print(opening_lines("notes-model"))
        from hgrn2.hf import HGRN2ForCausalLM
        model = HGRN2ForCausalLM.from_pretrained('notes-model')
    """
    return f"from hgrn2.hf import HGRN2ForCausalLM\nmodel = HGRN2ForCausalLM.from_pretrained({folder!r})"


def _size_of_state(config: HGRN2Config, num_bytes: int) -> str:
    caches = cache_costs(config)
    if not caches:
        return f"{num_bytes:,} bytes, whatever its length"
    grown = (
        f"{cache.bytes_per_token:,} a token for the {cache.mixer} cache"
        + ("" if cache.limit is None else f" (up to {plural(cache.limit, 'token')})")
        for cache in caches
    )
    return f"{num_bytes:,} bytes, and {' and '.join(grown)}"


def write_card(
    name: str, config: HGRN2Config, *, source: Path, settings: Mapping[str, Any], has_tokenizer: bool, dtype: str
) -> str:
    """Return the text of a model card.

    Args:
        name: name of the new folder.
        config: configuration of the model.
        source: the folder that the model comes from; a card there may name a licence.
        settings: that folder's config.json, which names the data of a run.
        has_tokenizer: whether the new folder has a tokenizer.
        dtype: dtype of the tensors, such as "float32".
    """
    costs = cost(config)
    found = _license_of(source / CARD_NAME)
    task = task_name(settings)
    data = _data_of(settings) if task is None else [f"examples of the synthetic task {task}"]
    attending = sum(memory != "state" for memory in config.layer_memories)
    kinds = "all recurrent" if not attending else f"{attending} of them attend, the others are recurrent"
    if config.layers is not None:
        kinds = "; ".join(f"{name} at {layers}" for name, layers in config.described_layers.items())
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- hgrn2"]
    if found is not None:
        header.append(f"license: {found}")
    loading = [
        "import hgrn2.hf  # makes the model type known to transformers' Auto classes",
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if has_tokenizer else ''}",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({name!r})",
    ]
    if has_tokenizer:
        loading.append(f"tokenizer = AutoTokenizer.from_pretrained({name!r})")
    from_transformer = settings.get("model_type", MODEL_TYPE) != MODEL_TYPE and attending < config.num_hidden_layers
    started = (
        " It was started from a Transformer: its recurrent layers are new and untrained." if from_transformer else ""
    )
    command = f"generate {_quoted(name)} --prompt Once" if has_tokenizer else f"info {_quoted(name)}"
    missing = "not known to the program that wrote this card; name it before you publish the model"
    return "\n".join(
        [
            "---", *header, "---", "",
            f"# {name}", "",
            "A causal language model of the HGRN2 architecture, a gated linear RNN "
            "([arXiv 2404.07904](https://arxiv.org/abs/2404.07904))." + started, "",
            "| | |", "| --- | --- |",
            f"| parameters | {costs.parameters:,} ({dtype}) |",
            f"| layers | {config.num_hidden_layers}: {kinds} |",
            f"| width | {config.hidden_size}, heads of {config.expand_ratio} |",
            f"| vocabulary | {config.vocab_size:,} tokens |",
            f"| state of a sequence | {_size_of_state(config, costs.state_bytes)} |",
            f"| training data | {', '.join(data) if data else missing} |",
            f"| licence | {found or missing} |", "",
            "## Use", "",
            "Install the package `hgrn2` with its extra `hf`. Without the first line, transformers says "
            "that it does not recognize the model type `hgrn2`; a newer version of transformers does not help.", "",
            "```python", *loading, "```", "",
            "Or at the command line:", "",
            f"    hgrn2 {command}", "",
        ]
    )  # fmt: skip


def _quoted(name: str) -> str:
    """Return a name quoted for POSIX shells and cmd.exe."""
    return name if re.fullmatch(r"[\w./+-]+", name) else f'"{name}"'


def _license_of(card: Path) -> str | None:
    """Return the licence named in a card's metadata; None without one."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    metadata = _METADATA.match(text.replace("\r\n", "\n"))
    found = _LICENSE.search(metadata[1]) if metadata else None
    return found[1] if found else None


def _data_of(settings: Mapping[str, Any]) -> list[str]:
    """Return the names of a run's data, without paths, which do not belong in a card."""
    table = settings.get("data")
    names = table.get("data") if isinstance(table, Mapping) else None
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return [name if name.startswith("hf:") else Path(name).name for name in names]
