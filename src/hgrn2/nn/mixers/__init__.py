"""Token mixers, one a file."""

from hgrn2.nn.mixers.attention import Attention
from hgrn2.nn.mixers.hgrn2 import HGRN2Mixer

__all__ = ["Attention", "HGRN2Mixer"]
