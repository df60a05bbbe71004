"""Sets of labelled images: folders, idx files, CIFAR's files, Hugging Face sets; decoding and augmentation."""

from hgrn2.data.images.augment import Augmentation, augment
from hgrn2.data.images.image_set import ImageSet, check_labels, check_same_classes, check_set, hold_out
from hgrn2.data.images.open_sets import decode_set, guess_channels, open_sets

__all__ = [
    "Augmentation",
    "ImageSet",
    "augment",
    "check_labels",
    "check_same_classes",
    "check_set",
    "decode_set",
    "guess_channels",
    "hold_out",
    "open_sets",
]
