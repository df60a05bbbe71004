"""Angles of rotary positions, inside and outside of a compiled program."""

import pytest
import torch

from hgrn2.nn.rotary import rotary_angles


def test_angles_by_hand():
    cos, sin = rotary_angles(torch.tensor([[0, 3]]), 2, 100.0, torch.float64)
    angle = torch.tensor([[[0.0, 0.0], [3.0, 0.3]]], dtype=torch.float64)
    torch.testing.assert_close((cos, sin), (angle.cos(), angle.sin()))


def test_the_operator_of_compiled_programs():
    position = torch.arange(-3, 7).view(2, 5)
    found = torch.ops.hgrn2.rotary_angles(position, 8, 10000.0, torch.float32)
    assert torch.equal(found, torch.stack(rotary_angles(position, 8, 10000.0, torch.float32)))
    torch.library.opcheck(torch.ops.hgrn2.rotary_angles.default, (position, 8, 10000.0, torch.float32))
    mapped = torch.vmap(lambda row: torch.ops.hgrn2.rotary_angles(row, 8, 10000.0, torch.float32))(position)
    assert torch.equal(mapped.transpose(0, 1), found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_on_a_gpu():
    position = torch.arange(50, device="cuda").unsqueeze(0)
    torch.compiler.reset()
    found = torch.compile(rotary_angles, fullgraph=True)(position, 32, 10000.0, torch.float32)
    torch.compiler.reset()
    torch.testing.assert_close(found, rotary_angles(position, 32, 10000.0, torch.float32))
