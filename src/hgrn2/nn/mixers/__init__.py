"""Token mixers: the protocol, the registry, and those of this package."""

from hgrn2.nn.mixers.attention import Attention
from hgrn2.nn.mixers.base import DirectedMixer, Mixer, MixerOptions, Projected, StateSpec, wide_dtype
from hgrn2.nn.mixers.context import Context, MixerState
from hgrn2.nn.mixers.directions import DIRECTIONS, read_directions
from hgrn2.nn.mixers.gla import GLA
from hgrn2.nn.mixers.griffin import Griffin
from hgrn2.nn.mixers.hgrn1 import HGRN1
from hgrn2.nn.mixers.hgrn2 import HGRN2
from hgrn2.nn.mixers.mamba import Mamba
from hgrn2.nn.mixers.rebased import ReBased
from hgrn2.nn.mixers.registry import check_directions, find_mixer, forget_mixer, mixer_names, register_mixer
from hgrn2.nn.mixers.rwkv5 import RWKV5
from hgrn2.nn.mixers.rwkv6 import RWKV6

__all__ = [
    "DIRECTIONS",
    "GLA",
    "HGRN1",
    "HGRN2",
    "RWKV5",
    "RWKV6",
    "Attention",
    "Context",
    "DirectedMixer",
    "Griffin",
    "Mamba",
    "Mixer",
    "MixerOptions",
    "MixerState",
    "Projected",
    "ReBased",
    "StateSpec",
    "check_directions",
    "find_mixer",
    "forget_mixer",
    "mixer_names",
    "read_directions",
    "register_mixer",
    "wide_dtype",
]
