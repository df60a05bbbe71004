"""The scans as exporters see them: ordinary operations, ONNX's LinearAttention, and programs of torch.export."""

from __future__ import annotations

import math

import pytest
import torch
from torch.export import Dim

import hgrn2.onnx
from hgrn2.ops import gated_scan, hgrn2_scan
from tests.numerics import EXTREME_RMS, relative_error
from tests.onnx_runtime import exporter_warnings, needs_onnx, runtime
from tests.ops.scan_cases import decays, free_inputs, slow, tied_inputs
from tests.refusals import refuses

LENGTHS = (1, 2, 63, 64, 65, 200, 1500)
FLOOR = -2.5
pytestmark = [*exporter_warnings]


class Scans(torch.nn.Module):
    """Both operators in every setting that changes what is computed."""

    def forward(self, q, f, v, lower_bound, initial_state, k, log_f):
        return (
            *hgrn2_scan(q, f, v, lower_bound, initial_state=initial_state, scale=0.5),
            *hgrn2_scan(q, f, v, reverse=True, q_activation="sigmoid", v_activation="silu", min_log_decay=FLOOR),
            *gated_scan(q, k, v, log_f, initial_state=initial_state, scale=2.0),
            *gated_scan(q, k, v, log_f, reverse=True),
        )


def inputs_of(batch, length, kind="ordinary"):
    """Inputs of `Scans`, K != V."""
    tied, free = tied_inputs(batch, length), free_inputs(batch, length)
    if kind == "slow":
        tied, free = (slow(make(batch, length, 1, 16, 5)) for make in (tied_inputs, free_inputs))
    elif kind != "ordinary":
        log_f = decays(kind, free["log_f"].shape)
        free["log_f"] = log_f
        # the same decays through the sigmoid; closed ones far out
        tied["f"] = (log_f - torch.log(-torch.expm1(log_f))).nan_to_num(neginf=-300, posinf=300).contiguous()
        tied["lower_bound"] = torch.zeros_like(tied["lower_bound"])
    names = ("q", "f", "v", "lower_bound", "initial_state")
    return *(tied[name] for name in names), free["k"], free["log_f"].contiguous()


def dynamic(inputs):
    """Batch and length of every input left open."""
    token = {0: Dim("B"), 1: Dim("T", max=4096)}
    shapes = [token] * len(inputs)
    shapes[3], shapes[4] = {}, {0: token[0]}
    return tuple(shapes)


def exact(inputs):
    class Reference(Scans):
        def forward(self, q, f, v, lower_bound, initial_state, k, log_f):
            exactly = {"backend": "reference"}
            rest = {"q_activation": "sigmoid", "v_activation": "silu", "min_log_decay": FLOOR}
            return (
                *hgrn2_scan(q, f, v, lower_bound, initial_state=initial_state, scale=0.5, **exactly),
                *hgrn2_scan(q, f, v, reverse=True, **rest, **exactly),
                *gated_scan(q, k, v, log_f, initial_state=initial_state, scale=2.0, **exactly),
                *gated_scan(q, k, v, log_f, reverse=True, **exactly),
            )

    return Reference()(*(x.double() for x in inputs))


def assert_close(found, wanted, limit=EXTREME_RMS):
    assert len(found) == len(wanted)
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        x = torch.as_tensor(x)
        assert x.shape == y.shape
        error = relative_error(x, y)
        assert max(error) < limit, (i, error)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "scans.onnx"
    inputs = inputs_of(2, 70)
    # by names, so that the exporter has to find out that all lengths are one
    shapes = tuple({axis: dim.__name__ for axis, dim in shape.items()} for shape in dynamic(inputs))
    torch.onnx.export(Scans().eval(), inputs, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    return runtime(path)


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_onnx_equals_eager(scans, batch, length):
    inputs = inputs_of(batch, length)
    assert_close(scans(*inputs), Scans()(*inputs))


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("kind", ["log-uniform", "per channel", "wild", "seldom reset", 0, -1e-4, -20, -math.inf])
def test_onnx_is_exact_for_any_gate(scans, kind):
    inputs = inputs_of(2, 200, kind)
    assert_close(scans(*inputs), exact(inputs))


@pytest.mark.slow
@needs_onnx
def test_slow_gates_lose_no_digits_in_onnx(scans):
    """Decays that float32 cannot hold: their rounding errors would all point the same way."""
    inputs = inputs_of(2, 1500)
    z = torch.full_like(inputs[1], 12.7)
    inputs = (inputs[0], z, *inputs[2:5], inputs[5] * 1e-6, torch.nn.functional.logsigmoid(z))
    assert_close(scans(*inputs), exact(inputs))


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("domain", ["com.microsoft", "ai.onnx"])
def test_linear_attention_of_a_program_equals_eager(domain, tmp_path, monkeypatch):
    # a runtime of today calls the standard's latest version one under development
    monkeypatch.setenv("ALLOW_RELEASED_ONNX_OPSET_ONLY", "0")
    inputs = inputs_of(2, 70)
    program = torch.export.export(Scans().eval(), inputs, dynamic_shapes=dynamic(inputs))
    found = hgrn2.onnx.export(program, f=tmp_path / "m.onnx", linear_attention=domain, verbose=False)
    operators = [node for node in found.model.graph if node.op_type == "LinearAttention"]
    assert [node.attributes["update_rule"].as_string() for node in operators] == ["gated"] * 4
    run = runtime(tmp_path / "m.onnx")
    for kind, length in (("ordinary", 1), ("ordinary", 200), ("wild", 65), (-20, 65), (-math.inf, 65)):
        inputs = inputs_of(3, length, kind)
        assert_close(run(*inputs), exact(inputs))


@pytest.mark.slow
@needs_onnx
def test_a_program_of_torch_export_in_ordinary_operations(tmp_path):
    inputs = inputs_of(2, 70)
    program = torch.export.export(Scans().eval(), inputs, dynamic_shapes=dynamic(inputs))
    hgrn2.onnx.export(program, f=tmp_path / "m.onnx", verbose=False)
    inputs = inputs_of(3, 65)
    assert_close(runtime(tmp_path / "m.onnx")(*inputs), Scans()(*inputs))


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ({"linear_attention": "onnx"}, "invalid-value", ("linear_attention", "'onnx'", "'ai.onnx'", "'com.microsoft'")),
        ({"dynamo": False}, "unsupported", ("dynamo", "False")),
        ({"linear_attention": "ai.onnx", "opset_version": 20}, "contradiction", ("opset_version", "20")),
    ],
)
def test_options_that_do_not_fit_are_refused(options, code, named):
    with refuses(code, *named):
        hgrn2.onnx.export(Scans(), inputs_of(1, 3), **options)


@needs_onnx
def test_packed_sequences_are_refused():
    class Packed(torch.nn.Module):
        def forward(self, q, f, v, cu_seqlens):
            return hgrn2_scan(q, f, v, cu_seqlens=cu_seqlens)

    inputs = tied_inputs(1, 9, cu_seqlens=[0, 4, 9])
    arguments = tuple(inputs[name] for name in ("q", "f", "v", "cu_seqlens"))
    with pytest.raises(Exception, match="cu_seqlens: packed sequences cannot be exported; export a batch"):
        torch.onnx.export(Packed().eval(), arguments, dynamo=True, verbose=False)
    program = torch.export.export(Packed().eval(), arguments)
    with refuses("unsupported", "cu_seqlens"):
        hgrn2.onnx.export(program, verbose=False)
