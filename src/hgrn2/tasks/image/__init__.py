"""Image classification: the task, its options and its pictures."""

from hgrn2.tasks.image.options import ImageOptions
from hgrn2.tasks.image.task import ImageTask

__all__ = ["ImageOptions", "ImageTask"]
