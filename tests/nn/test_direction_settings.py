"""Directions of mixers as settings: patterns, mixers that have none, states, errors, and what a direction costs."""

import pytest
import torch

from hgrn2 import HGRN2Mixer
from hgrn2.nn.mixers import (
    DIRECTIONS,
    Context,
    DirectedMixer,
    check_directions,
    find_mixer,
    mixer_names,
    read_directions,
)
from tests.refusals import refuses


def test_patterns_give_each_layer_a_direction():
    assert read_directions("alternating", 5) == ("causal", "reverse", "causal", "reverse", "causal")
    assert read_directions("alternating-2d", 4) == ("causal", "reverse", "columns", "columns-reverse")
    assert read_directions("causal, 2d", 3) == read_directions(["causal", "2d"], 3) == ("causal", "2d", "causal")
    with refuses("unknown-name", "bidirectionl", "'bidirectional'"):
        read_directions("bidirectionl", 2)
    with refuses("contradiction", "2", "1"):
        read_directions("alternating", 1)
    for wrong in (None, [], 3, [3]):
        with refuses("invalid-value", "directions"):
            read_directions(wrong, 2)


def test_a_mixer_that_can_only_be_causal_says_so():
    able = [name for name in mixer_names() if issubclass(find_mixer(name).mixer, DirectedMixer)]
    assert {"hgrn2", "hgrn1", "attention", "gla", "griffin", "mamba"} <= set(able)
    check_directions(["2d"] * len(able), able)
    check_directions(["causal"], ["rwkv6"])
    with refuses("unsupported", "reverse", "rwkv6", "mamba"):
        check_directions(["causal", "reverse"], ["hgrn2", "rwkv6"])
    found = find_mixer("rebased")
    with refuses("unsupported", "bidirectional", "ReBased"):
        found.build(32, found.options(), direction="bidirectional")


@pytest.mark.parametrize("direction", [d for d in DIRECTIONS if d != "causal"])
def test_only_a_causal_layer_has_a_state(direction):
    mixer = HGRN2Mixer(8, 4, direction=direction)
    x = torch.randn(1, 6, 8)
    y, state = mixer(x, grid=(2, 3))
    assert y.shape == x.shape
    assert state == {}
    with refuses("unsupported", direction, "state"):
        mixer(x, state=HGRN2Mixer(8, 4).init_state(1), grid=(2, 3))


def test_the_direction_changes_no_parameter():
    torch.manual_seed(0)
    wanted = HGRN2Mixer(8, 4).state_dict()
    torch.manual_seed(0)
    found = HGRN2Mixer(8, 4, direction="2d").state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("taps", [1, 2, 3, 4])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_convolution_starts_as_the_identity_in_its_direction(direction, taps):
    torch.manual_seed(0)
    plain, x = HGRN2Mixer(8, 4, direction=direction), torch.randn(2, 6, 8)
    mixer = HGRN2Mixer(8, 4, conv_size=taps, direction=direction)
    mixer.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(mixer(x, grid=(2, 3))[0], plain(x, grid=(2, 3))[0])


@pytest.mark.parametrize(
    ("direction", "arguments", "code", "names"),
    [
        ("2d", {}, "incomplete", ["2d", "grid"]),
        ("2d-series", {"grid": (2, 4)}, "mismatch", ["(2, 4)", "6"]),
        ("columns", {"grid": (2.0, 3)}, "invalid-value", ["grid", "2.0"]),
        ("2d", {"grid": 6}, "invalid-value", ["grid", "6"]),
        ("2d", {"grid": (6,)}, "invalid-value", ["grid", "6"]),
        ("2d", {"grid": (-2, -3)}, "invalid-value", ["grid", "-2"]),
        ("2d", {"grid": (2, 3), "cu_seqlens": torch.tensor([0, 2, 6])}, "unsupported", ["2d", "cu_seqlens"]),
    ],
)
def test_errors_name_the_direction_or_the_grid(direction, arguments, code, names):
    with refuses(code, *names):
        HGRN2Mixer(8, 4, direction=direction)(torch.randn(1, 6, 8), **arguments)


@pytest.mark.parametrize("direction", ["sideways", None, 2])
def test_a_direction_that_does_not_exist_is_refused(direction):
    with refuses("unknown-name" if direction == "sideways" else "invalid-value", "direction"):
        HGRN2Mixer(8, 4, direction=direction)


def saved_bytes(mixer, x, context):
    """Bytes that torch keeps for the backward pass, without the weights and x."""
    known = {t.untyped_storage().data_ptr() for t in (x, *mixer.parameters())}
    saved = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            # the tensor is kept so that no other gets its place
            saved[storage.data_ptr()] = (storage.nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        mixer(x, None, context)
    return sum(nbytes for nbytes, _ in saved.values())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hgrn2", {"expand_ratio": 32}), ("hgrn1", {"form": "real"}), ("hgrn1", {"form": "complex"}),
        ("gla", {"num_heads": 2}), ("griffin", {"num_blocks": 4}), ("mamba", {}), ("attention", {"num_heads": 4}),
    ],
)  # fmt: skip
def test_activations_are_about_what_torch_saves(name, options, direction):
    if (name == "attention" and "reverse" in direction) or (name == "mamba" and direction.startswith("2d")):
        pytest.skip("masks, and copies of columns, are not counted")
    found = find_mixer(name)
    mixer = found.build(128, found.options(**options), direction=direction)
    x, bound = torch.randn(1, 256, 128, requires_grad=True), torch.rand(128) / 2
    context = Context(keep_state=False, lower_bound=bound if mixer.uses_lower_bound else None, grid=(16, 16))
    measured = saved_bytes(mixer, x, context) / 256
    assert mixer.activation_bytes_in_direction(256, 4) == pytest.approx(measured, rel=0.15)


def test_operations_count_every_scan():
    def flops(direction, name="hgrn2", **options):
        found = find_mixer(name)
        return found.build(32, found.options(**options), direction=direction).flops_in_direction(100)

    one = flops("causal", expand_ratio=8)
    assert flops("reverse", expand_ratio=8) == flops("columns", expand_ratio=8) == one
    assert flops("bidirectional", expand_ratio=8) == 2 * one
    assert flops("2d", expand_ratio=8) == 4 * one
    assert flops("2d-series", expand_ratio=8) == 4 * one + 4 * 2 * 32 * 32
    assert flops("2d", "attention", num_heads=4) == 4 * 100 * 32
    assert flops("bidirectional", "attention", num_heads=4, window_size=3) == 4 * 5 * 32
