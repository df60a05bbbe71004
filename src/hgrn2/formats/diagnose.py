"""Recognise inputs that are not language models, and explain how to convert them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from hgrn2.errors import UserError
from hgrn2.formats.reading import CONFIG_NAME, find_weights, read_json
from hgrn2.formats.tables import HEAD

_ADAPTER_CONFIG = "adapter_config.json"
_CLASSIFIER = "score.weight"
_BODY = "model."


def check_is_model(path: Path) -> None:
    """Refuse adapters of PEFT and GGUF files; the reader of the folder reports other faults.

    Args:
        path: the folder or file that was given as a model.

    Raises:
        UserError: path is an adapter or a GGUF file.
    """
    if (path / _ADAPTER_CONFIG).is_file():
        # the adapter may have been tuned without a folder of the model
        base = read_json(path / _ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE"
        model = f"transformers.AutoModelForCausalLM.from_pretrained({base!r})"
        merge = f"peft.PeftModel.from_pretrained({model}, {str(path)!r}).merge_and_unload().save_pretrained('OUT')"
        raise UserError(
            f"{path}: holds an adapter of PEFT, which is no model; merge it in Python, after import hgrn2.hf: {merge}, "
            "and copy the tokenizer's files into OUT",
            "unsupported",
        )
    file = _gguf(path)
    if file is not None:
        kind = "is" if file == path else "holds"
        names = f"{str(file.parent)!r}, gguf_file={file.name!r}"
        whole = f"quantization_config=GgufConfig(gguf_file={file.name!r}, dequantize=True), dtype='float32'"
        raise UserError(
            f"{path}: {kind} a GGUF file, which is not read; write a folder of it in Python, "
            f"by transformers and gguf: AutoModelForCausalLM.from_pretrained({names}, {whole}).save_pretrained('OUT') "
            f"and AutoTokenizer.from_pretrained({names}).save_pretrained('OUT')",
            "unsupported",
        )


def _gguf(path: Path) -> Path | None:
    if path.is_dir():
        # beside a config.json it is a copy that was made of the model
        other = (path / CONFIG_NAME).exists() or find_weights(path) is not None
        return None if other else next(iter(sorted(path.glob("*.gguf"))), None)
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            begin = file.read(4)
    except OSError:
        # the reader of the file reports it
        return None
    # files in a cache have arbitrary names
    return path if begin == b"GGUF" or path.suffix.lower() == ".gguf" else None


def describe_other_head(path: Path, found: Collection[str], wanted: Collection[str]) -> str | None:
    """Describe a folder that has all tensors of a language model but the head; None for any other folder.

    Args:
        path: the folder.
        found: names of its tensors.
        wanted: names of the tensors of a language model.
    """
    body = set(wanted) - {HEAD}
    if {_BODY + name for name in found} == body:
        what = "a model without a head, as AutoModel(...).save_pretrained writes it"
    elif set(found) == body | {_CLASSIFIER}:
        what = "a classifier"
    else:
        return None
    make = f"transformers.AutoModelForCausalLM.from_pretrained({str(path)!r}).save_pretrained('OUT')"
    return (
        f"holds {what}; wanted a language model. If its head is the embeddings, or will be trained, make one in "
        f"Python, after import hgrn2.hf: {make}"
    )
