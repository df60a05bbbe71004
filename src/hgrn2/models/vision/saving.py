"""Folders of image models: config.json and model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.models.vision.config import VisionConfig
from hgrn2.models.vision.model import VisionModel
from hgrn2.storage.json_files import read_json_object

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"


def save_model(
    folder: Path | str, config: VisionConfig, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None
) -> Path:
    """Write an image model.

    Args:
        folder: made if it does not exist; its files of these names are replaced.
        config: configuration of the model.
        tensors: parameters and buffers by name, as `model.state_dict()` returns them.
        about: further JSON values for config.json, such as the names of the classes.

    Returns:
        The folder.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, str(folder / WEIGHTS_NAME))
    text = json.dumps({"model": config.to_dict(), **(about or {})}, indent=1)
    (folder / CONFIG_NAME).write_text(text + "\n")
    return folder


def load_model(folder: Path | str) -> tuple[VisionModel, dict[str, Any]]:
    """Read an image model that `save_model` or a run wrote.

    Args:
        folder: the folder; for a run, RUN/model.

    Returns:
        The model in evaluation mode on the CPU, and the further values of config.json.

    Raises:
        UserError: a file is missing or damaged, or the tensors do not fit the configuration.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    about = read_json_object(folder / CONFIG_NAME, "name a folder with an image model, such as RUN/model")
    if not isinstance(about.get("model"), dict):
        raise UserError(f"{folder / CONFIG_NAME}: no 'model' settings; name a folder with an image model", "damaged")
    model = VisionModel(VisionConfig.from_dict(about.pop("model")))
    try:
        tensors = load_file(str(folder / WEIGHTS_NAME))
    except FileNotFoundError:
        raise UserError(
            f"{folder / WEIGHTS_NAME}: no such file; name a folder with an image model", "not-found"
        ) from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS_NAME}: cannot be read ({error})", "damaged") from error
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    if wanted != found:
        differing = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        raise UserError(f"{folder}: {', '.join(differing[:5])} do not fit the configuration", "mismatch")
    model.load_state_dict(tensors)
    return model.eval(), about
