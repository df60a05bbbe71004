"""Options of the image task."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, ClassVar, Literal

from hgrn2.constraints import Ge, Gt, Le, Lt
from hgrn2.data.images.augment import Augmentation
from hgrn2.tasks.classification import ClassificationOptions


@dataclass(frozen=True)
class ImageOptions(ClassificationOptions, Augmentation):
    """Options of the image task, including those of `hgrn2.data.images.Augmentation`."""

    what: ClassVar[str] = "image options"
    paths: ClassVar[tuple[str, ...]] = ("data", "validation")

    data: str = ""
    """Folder of the images: class folders (or train and val with them), idx or CIFAR files, a Hugging Face set."""
    validation: str | None = None
    """Folder of validation images (default: those of data, or a part held out)."""
    validation_share: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Share of the images that is held out, if there are no validation images."""
    storage: Literal["auto", "memory", "stream"] = "auto"
    """Decode all images at the start (memory), or each batch when it is needed (stream); auto: memory up to 4 GiB.

    Idx and CIFAR files are always in memory."""
    workers: Annotated[int, Gt(0), Le(1024)] = 8
    """Threads that decode images."""
    plain_share: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of the epochs, the last ones of `epochs`, that train without mixing and random operations."""
    epochs: Annotated[float | None, Gt(0)] = None
    """Epochs of the budget, which plain_share refers to."""

    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Decay of the running mean of the weights, which is validated and saved; 0 for none."""
    eval_batch_size: Annotated[int, Gt(0)] = 500
    """Images of a batch in a validation."""

    @property
    def augmentation(self) -> Augmentation:
        """Settings of augmentation."""
        return Augmentation(**{field.name: getattr(self, field.name) for field in fields(Augmentation)})
