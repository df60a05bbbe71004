"""Registration of the presets with timm."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

from hgrn2.models.vision.config import VisionConfig
from hgrn2.models.vision.model import VisionModel
from hgrn2.models.vision.presets import PRESETS

# mean and standard deviation of ImageNet's channels, as timm normalises by default
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_KEYS = frozenset(VisionConfig.__dataclass_fields__)
_registered: list[str] = []
# timm reads the configurations from this module
default_cfgs: dict[str, dict[str, Any]] = {}


def register_with_timm() -> list[str]:
    """Register the presets with timm, so that `timm.create_model("hgrn2_vit_tiny")` makes one.

    Returns:
        The names; none if timm is not installed, or cannot be imported because its torchvision does not work.
    """
    if _registered or importlib.util.find_spec("timm") is None:
        return list(_registered)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            registry = importlib.import_module("timm.models")
    except (ImportError, RuntimeError, OSError):
        return []
    for name in PRESETS:
        default_cfgs[name] = _pretrained_config(name)
        registry.register_model(_entry(name))
        _registered.append(name)
    return list(_registered)


def _entry(name: str) -> Callable[..., VisionModel]:
    """Return the function that timm calls to make a model."""

    def create(pretrained: bool = False, **kwargs: Any) -> Any:
        return importlib.import_module("timm.models").build_model_with_cfg(
            _build,
            name,
            pretrained,
            pretrained_cfg=kwargs.pop("pretrained_cfg", None) or _pretrained_config(name),
            feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
            preset_name=name,
            **kwargs,
        )

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    create.__doc__ = f"Make the image model {name}."
    return create


def _build(preset_name: str, **kwargs: Any) -> VisionModel:
    """Make a model from timm's arguments; None means the preset's value."""
    from hgrn2.models.vision.presets import preset

    changes = {key: value for key, value in kwargs.items() if key in _KEYS and value is not None}
    if (rate := kwargs.get("drop_path")) is not None:
        changes.setdefault("drop_path_rate", rate)
    unknown = [key for key in kwargs if key not in _KEYS | {"drop_path"} and kwargs[key] is not None]
    if unknown:
        # raises an error that suggests similar names
        VisionConfig.from_dict(dict.fromkeys(unknown))
    return VisionModel(preset(preset_name, **changes))


def _pretrained_config(name: str) -> dict[str, Any]:
    """Return timm's description of a model's inputs; there are no weights to download."""
    config = VisionConfig.from_dict(PRESETS[name])
    first = "patch_embed.proj" if config.stem == "patch" else "patch_embed.convs.0"
    return {
        "url": "", "num_classes": config.num_classes, "input_size": (config.in_chans, *config.img_size),
        "pool_size": None, "crop_pct": 0.9 if config.img_size[0] > 64 else 1.0, "interpolation": "bicubic",
        "mean": _MEAN, "std": _STD, "first_conv": first,
        "classifier": "head", "fixed_input_size": config.position == "learned",
    }  # fmt: skip
