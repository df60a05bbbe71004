"""Mixers are registered whole, under a name of their own."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.nn.mixers import Mixer, MixerOptions, StateSpec, find_mixer, forget_mixer, mixer_names, register_mixer
from tests.models.cases import SIZE, tokens
from tests.plug_ins import install
from tests.refusals import refuses


@dataclass(frozen=True)
class Options(MixerOptions):
    pass


class Whole(Mixer):
    """Passes x on; adds the features of the layer before, and can neither pack nor pad."""

    num_earlier = 1

    def __init__(self, hidden_size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.seen = []

    def forward(self, x, state, context):
        self.seen.append((context.lower_bound, len(context.earlier)))
        for features in context.earlier:
            x = x + features["x"]
        return x * self.weight, {}, {"x": x}

    def state_spec(self, dtype):
        return {}

    def reset_parameters(self, init):
        nn.init.ones_(self.weight)

    def flops(self, seq_len):
        return 0

    def activation_bytes(self, seq_len, low):
        return 0


@pytest.fixture
def whole():
    register_mixer("whole", Options)(Whole)
    yield
    forget_mixer("whole")


@pytest.mark.parametrize("part", ["forward", "state_spec", "reset_parameters", "flops", "activation_bytes"])
def test_a_part_that_is_missing_is_named(part):
    parts = {name: value for name, value in vars(Whole).items() if name != part and not name.startswith("__")}
    partial = type("Partial", (Mixer,), parts)
    with refuses("incomplete", "partial", part):
        register_mixer("partial", Options)(partial)
    assert "partial" not in mixer_names()


def test_options_and_base_class_are_parts():
    @dataclass
    class Loose:
        size: int = 1

    for options in (Loose, int):
        with refuses("incomplete", "partial", "MixerOptions"):
            register_mixer("partial", options)(Whole)  # pyright: ignore[reportArgumentType]
    with refuses("incomplete", "partial", "Mixer"):
        register_mixer("partial", Options)(nn.Linear)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_a_name_is_taken_once(whole):
    for name in ("whole", "hgrn2"):
        with refuses("already-exists", name):
            register_mixer(name, Options)(Whole)
    with refuses("unknown-name", "whol", "whole"):
        find_mixer("whol")


def test_features_reach_the_layers_that_want_them(whole):
    config = HGRN2Config.from_dict(SIZE | {"num_hidden_layers": 4, "layers": ["whole", "hgrn2", "whole", "whole"]})
    model = HGRN2LM(config)
    model(tokens(2, 5))
    seen = [layer.attn.seen for layer in model.model.layers if isinstance(layer.attn, Whole)]
    # no bound, and the features of the nearest layer that left some
    assert seen == [[(None, 0)], [(None, 1)], [(None, 1)]]


def test_what_a_mixer_cannot_follow_is_refused(whole):
    model = HGRN2LM(HGRN2Config.from_dict(SIZE | {"layers": "whole"}))
    with refuses("unsupported", "whole", "cu_seqlens"):
        model(tokens(1, 5), cu_seqlens=torch.tensor([0, 2, 5]))
    with refuses("unsupported", "whole", "mask"):
        model(tokens(1, 5), attention_mask=torch.ones(1, 5))


def test_what_a_spec_says_of_a_tensor():
    fixed, growing = StateSpec((3, 4), torch.float32), StateSpec((0, 4), torch.float64, grows=True, limit=7)
    assert fixed.zeros(2, "cpu").shape == (2, 3, 4)
    assert (fixed.num_bytes, fixed.bytes_per_token) == (48, 0)
    assert (growing.num_bytes, growing.bytes_per_token) == (0, 32)
    assert fixed.matches(torch.zeros(5, 3, 4))
    assert not fixed.matches(torch.zeros(5, 2, 4))
    assert growing.matches(torch.zeros(5, 9, 4))
    assert not growing.matches(torch.zeros(5, 9, 3))
    assert not growing.matches(torch.zeros(5, 9))


def test_an_installed_package_brings_its_mixer(tmp_path, monkeypatch):
    source = (
        "from hgrn2.nn.mixers import register_mixer\n"
        "from tests.nn.test_registry import Options, Whole\n"
        "register_mixer('brought', Options)(Whole)\n"
    )
    install(tmp_path, monkeypatch, "mixers", "brought = mixer_of_another", source)
    assert "brought" not in mixer_names()
    # names that are not imported yet are near, too
    with refuses("unknown-name", "'brough'", "'brought'"):
        find_mixer("brough")
    try:
        assert HGRN2Config.from_dict(SIZE | {"layers": "brought"}).layer_mixers == ("brought",) * 3
    finally:
        forget_mixer("brought")


@pytest.mark.parametrize(
    ("roles", "code", "names"),
    [
        ({}, "incomplete", ["weight"]),
        (None, "incomplete", ["None"]),
        ({"weight": "vecotr"}, "unknown-name", ["weight", "'vecotr'", "vector"]),
        ({"weight": ["vector"]}, "unknown-name", ["weight", "['vector']"]),
    ],
)
def test_roles_that_a_mixer_must_give(whole, monkeypatch, roles, code, names):
    monkeypatch.setattr(Whole, "parameter_roles", lambda self: roles, raising=False)
    model = HGRN2LM(HGRN2Config.from_dict(SIZE | {"layers": "whole"}))
    with refuses(code, "Whole.parameter_roles", *names):
        model.parameter_roles()
