"""Axes are checked while tests run: a wrong shape inside the package is an error."""

from typing import Annotated

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("jaxtyping")

from hgrn2.nn.norm import Norm
from hgrn2.nn.short_conv import ShortConv
from hgrn2.ops import gated_scan, hgrn2_scan, hgrn2_step
from hgrn2.shapes import BTD
from tests.axes import AxesError, checked

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="not switched on beside GPU tests")


def test_one_letter_has_one_size():
    @checked
    def flip(x: BTD, y: BTD | None = None) -> tuple[BTD, Annotated[Tensor, "B D"]]:
        return x, x[:, -1] if y is None else y

    x = torch.zeros(2, 3, 4)
    assert flip(x)[0] is x
    with pytest.raises(AxesError, match=r"flip: return\[1\] has shape \[2, 3, 4\], annotated \[B D\]"):
        flip(x, x)
    with pytest.raises(AxesError, match="flip: y has shape"):
        flip(x, x[:, :2])
    # the function's own error comes first
    with pytest.raises(IndexError):
        flip(torch.zeros(2))


def test_what_names_no_axes_is_left_alone():
    def plain(x: Tensor, n: int) -> Tensor:
        return x

    assert checked(plain) is plain


def test_a_wrong_shape_inside_a_norm_is_caught(monkeypatch):
    layer, x = Norm("rmsnorm", 4, 1e-5, affine=False), torch.randn(2, 3, 4)
    layer(x)
    monkeypatch.setattr("hgrn2.nn.norm.rms_norm", lambda x, *_: x[..., :2])
    with pytest.raises(AxesError, match=r"Norm.forward: return has shape \[2, 3, 2\]"):
        layer(x)


def test_a_wrong_shape_inside_a_short_convolution_is_caught(monkeypatch):
    layer, x = ShortConv(4, 3), torch.randn(2, 5, 4)
    layer(x, None, None)
    right = functional.conv1d
    monkeypatch.setattr("hgrn2.nn.short_conv.functional.conv1d", lambda *a, **k: right(*a, **k)[..., 1:])
    with pytest.raises(AxesError, match=r"ShortConv.forward: return\[0\] has shape \[2, 4, 4\]"):
        layer(x, None, None)


@pytest.mark.parametrize("op", [hgrn2_scan, gated_scan, hgrn2_step], ids=lambda op: op.__name__)
def test_operators_are_checked(op):
    # what importing it put around it
    assert op.__wrapped__.__annotations__["return"].startswith("tuple[B")


def test_compiled_calls_see_no_check():
    @checked
    def double(x: BTD) -> BTD:
        return 2 * x

    graphs = []
    compiled = torch.compile(double, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    assert torch.equal(compiled(torch.ones(1, 2, 3)), torch.full((1, 2, 3), 2.0))
    assert len(graphs) == 1
