"""Token mixers: the protocol, the registry, and those of this package."""

from hgrn2.nn.mixers.attention import Attention
from hgrn2.nn.mixers.base import Context, Mixer, MixerOptions, MixerState, StateSpec, wide_dtype
from hgrn2.nn.mixers.gla import GLA
from hgrn2.nn.mixers.griffin import Griffin
from hgrn2.nn.mixers.hgrn1 import HGRN1
from hgrn2.nn.mixers.hgrn2 import HGRN2
from hgrn2.nn.mixers.mamba import Mamba
from hgrn2.nn.mixers.rebased import ReBased
from hgrn2.nn.mixers.registry import find_mixer, forget_mixer, mixer_names, register_mixer
from hgrn2.nn.mixers.rwkv5 import RWKV5
from hgrn2.nn.mixers.rwkv6 import RWKV6

__all__ = [
    "GLA",
    "HGRN1",
    "HGRN2",
    "RWKV5",
    "RWKV6",
    "Attention",
    "Context",
    "Griffin",
    "Mamba",
    "Mixer",
    "MixerOptions",
    "MixerState",
    "ReBased",
    "StateSpec",
    "find_mixer",
    "forget_mixer",
    "mixer_names",
    "register_mixer",
    "wide_dtype",
]
