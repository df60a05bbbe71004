"""Models through torch.export and in ONNX Runtime: prompts, steps, and lengths left open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from hgrn2 import HGRN2LM, AttentionConfig, HGRN2Config, ModelState
from hgrn2.errors import UserError
from tests.models.cases import config_of, make_model
from tests.models.cases import tokens as ids_of
from tests.numerics import EXTREME_RMS, relative_error
from tests.onnx_runtime import exporter_warnings, needs_onnx, runtime

ROOT = Path(__file__).resolve().parent.parent.parent
WINDOW = 5
LENGTHS = (1, 2, WINDOW - 1, WINDOW, 63, 64, 65, 200, 1500)
GROWING = ("key", "value", "valid")
pytestmark = [*exporter_warnings]


def small_model(window: int | None = WINDOW, **settings: object) -> HGRN2LM:
    """A hybrid whose lower bounds differ from layer to layer, with gates from open to closed."""
    torch.manual_seed(0)
    attn = AttentionConfig(layers=(1,), num_heads=2, window_size=window)
    config = HGRN2Config(
        vocab_size=50, hidden_size=16, expand_ratio=8, num_hidden_layers=3, intermediate_size=16, attn=attn, **settings
    )
    model = HGRN2LM(config).eval()
    for layer in (0, 2):
        torch.nn.init.normal_(model.model.layers[layer].attn.f_proj.weight, std=8)
    return model


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(length))


def state_shapes(state: ModelState) -> list[tuple[dict[str, dict[int, str]], ...]]:
    """Batch of every tensor, and places of attention's, left open."""
    return [tuple({k: {0: "B"} | ({1: "S"} if k in GROWING else {}) for k in layer} for layer in state.layers)]


def assert_equal(found, wanted):
    found, wanted = tree_leaves(found), tree_leaves(wanted)
    assert len(found) == len(wanted)
    for x, y in zip(found, wanted, strict=True):
        if x.shape != y.shape:
            # an exported window has as many places from the start, those not used in front
            unused = x.shape[1] - y.shape[1]
            assert x.shape[1] == WINDOW - 1
            assert not x[:, :unused].any()
            x = x[:, unused:]
        assert x.shape == y.shape
        assert x.numel() == 0 or relative_error(x.double(), y.double()).max < EXTREME_RMS


@pytest.mark.slow
@needs_onnx
def test_a_prompt_in_onnx(tmp_path):
    model = small_model()
    torch.onnx.export(
        model, (tokens(2, 70),), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=({0: "B", 1: "T"},), verbose=False
    )
    run = runtime(tmp_path / "m.onnx")
    for length in LENGTHS:
        for batch in (1, 3):
            ids = tokens(batch, length)
            with torch.no_grad():
                assert_equal(run(ids), model(ids))


@pytest.mark.slow
@needs_onnx
@torch.no_grad()
@pytest.mark.parametrize("new", [1, 9], ids=["a step", "a second prompt"])
def test_a_state_goes_in_and_comes_out_in_onnx(tmp_path, new):
    model = small_model(None, use_short_conv=True, conv_size=4)
    _, state = model(tokens(2, 70))
    shapes = ({0: "B"} if new == 1 else {0: "B", 1: "T"}, state_shapes(state))
    torch.onnx.export(
        model, (tokens(2, new), state), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    run = runtime(tmp_path / "m.onnx")
    for batch, length in ((1, 3), (3, 70), (2, 300)):
        _, state = model(tokens(batch, length))
        for t in range(3):
            ids = tokens(batch, 1 if new == 1 else 1 + 20 * t)
            wanted = model(ids, state)
            assert_equal(run(ids, state), wanted)
            state = wanted[1]


@pytest.mark.slow
@pytest.mark.parametrize(("window", "strict"), [(None, False), (WINDOW, False), (WINDOW, True)])
def test_one_exported_program_for_every_length(window, strict):
    model = small_model(window)
    length = Dim("T", min=2, max=4096)
    program = torch.export.export(model, (tokens(2, 70),), dynamic_shapes=({0: Dim("B"), 1: length},), strict=strict)
    module = program.module()
    with torch.no_grad():
        for count in (2, WINDOW, 64, 1500, 4096):
            assert_equal(module(tokens(1, count)), model(tokens(1, count)))


def test_an_exported_program_has_gradients():
    model = small_model()
    program = torch.export.export(model, (tokens(2, 70),), dynamic_shapes=({1: Dim("T", min=2, max=4096)},))
    module = program.module()
    ids = tokens(2, 1100)
    for net in (model, module):
        logits, _ = net(ids)
        logits.square().sum().backward()
    gradients = ({name: x.grad for name, x in net.named_parameters()} for net in (module, model))
    assert_equal(*gradients)


@pytest.mark.slow
def test_a_saved_program_opens_in_another_process(tmp_path):
    model, ids = small_model(), tokens(2, 20)
    program = torch.export.export(model, (ids,), dynamic_shapes=({0: Dim("B"), 1: Dim("T", min=2, max=4096)},))
    torch.export.save(program, tmp_path / "m.pt2")
    script = """
import sys, torch, hgrn2
import hgrn2.models
logits, state = torch.export.load(sys.argv[1]).module()(torch.load(sys.argv[2]))
assert type(state) is hgrn2.ModelState
torch.save(logits.detach(), sys.argv[3])
"""
    torch.save(ids, tmp_path / "ids.pt")
    paths = [str(tmp_path / name) for name in ("m.pt2", "ids.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", script, *paths], check=True, cwd=ROOT / "src")
    with torch.no_grad():
        assert_equal(torch.load(tmp_path / "logits.pt"), model(ids)[0])


# torch's exporter compares its example with the program in float32
@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense-signed", "rwkv6", "rebased", "hgrn1", "mamba", "griffin"])
def test_every_mixer_exports_for_every_length(name):
    model = make_model(config_of(name), torch.float32)
    shapes = ({0: Dim("B"), 1: Dim("T", min=2, max=4096)},)
    module = torch.export.export(model, (ids_of(2, 70),), dynamic_shapes=shapes).module()
    with torch.no_grad():
        for length in (2, 65, 200):
            found, wanted = module(ids_of(1, length)), model(ids_of(1, length))
            for x, y in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-3)


@pytest.mark.slow
@needs_onnx
def test_signed_gates_and_earlier_features_in_onnx(tmp_path):
    model = make_model(config_of("dense-signed").replace(num_hidden_layers=2), torch.float32)
    shapes = ({0: "B", 1: "T"},)
    torch.onnx.export(model, (ids_of(2, 70),), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
    run = runtime(tmp_path / "m.onnx")
    with torch.no_grad():
        for length in (1, 65):
            for x, y in zip(tree_leaves(run(ids_of(3, length))), tree_leaves(model(ids_of(3, length))), strict=True):
                torch.testing.assert_close(torch.as_tensor(x), y, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("name", ["hgrn1", "mamba"])
def test_mixers_with_element_wise_states_are_refused_by_onnx(tmp_path, name):
    model = make_model(config_of(name), torch.float32)
    with pytest.raises(Exception, match="export") as caught:
        torch.onnx.export(model, (ids_of(1, 9),), tmp_path / "m.onnx", dynamo=True, verbose=False)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    assert error is not None
    assert error.code == "unsupported"
