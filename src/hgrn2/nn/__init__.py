"""Layers: they take plain numbers, never a config."""

from hgrn2.nn.mixers.layer import HGRN2Mixer

__all__ = ["HGRN2Mixer"]
