"""Options of the image task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from hgrn2.constraints import Ge, Gt, Le, Lt
from hgrn2.data.images.augment import Augmentation
from hgrn2.tasks.classification import ClassificationOptions


@dataclass(frozen=True)
class ImageOptions(ClassificationOptions):
    """Options of the image task; those of augmentation are documented in `hgrn2.data.images.Augmentation`."""

    what: ClassVar[str] = "image options"
    paths: ClassVar[tuple[str, ...]] = ("data", "validation")

    data: str = ""
    """Folder of the images: class folders (or train and val with them), idx or CIFAR files, a Hugging Face set."""
    validation: str | None = None
    """Folder of validation images (default: those of data, or a part held out)."""
    validation_share: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Share of the images that is held out, if there are no validation images."""
    storage: Literal["auto", "memory", "stream"] = "auto"
    """Decode all images at the start (memory), or every batch anew (stream); auto: memory up to 4 GiB.

    Idx and CIFAR files are always in memory."""
    workers: Annotated[int, Gt(0), Le(1024)] = 8
    """Threads that decode images."""

    crop_padding: Annotated[int, Ge(0)] = 0
    """Random shift of up to this many pixels."""
    flip: bool = False
    """Mirror images left to right at random."""
    min_scale: Annotated[float, Gt(0), Le(1)] = 1.0
    """Smallest area of a random crop as a share of the image; 1 for none."""
    strength: Annotated[float, Ge(0), Le(1)] = 0.0
    """Strength of random geometric and colour operations; 0 for none."""
    erase: Annotated[float, Ge(0), Le(1)] = 0.0
    """Probability of erasing a rectangle."""
    mixup: Annotated[float, Ge(0)] = 0.0
    """Parameter of the Beta distribution of mixup; 0 for none."""
    cutmix: Annotated[float, Ge(0)] = 0.0
    """Parameter of the Beta distribution of cutmix; 0 for none."""
    mix_share: Annotated[float, Ge(0), Le(1)] = 1.0
    """Share of the images that mixup or cutmix mixes."""
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
        return Augmentation(
            self.crop_padding, self.flip, self.min_scale, self.strength, self.erase, self.mixup, self.cutmix,
            self.mix_share,
        )  # fmt: skip
