"""Packed sequences that go to torch's kernel for several lengths; `test_attention_gpu.py` runs it."""

from types import SimpleNamespace

import pytest
import torch

from hgrn2.nn.mixers import attention


def query(dtype=torch.bfloat16, size=64, length=5, is_cuda=True):
    shape = (1, length, 2, size)
    device = torch.device("cuda", 0)
    return SimpleNamespace(dtype=dtype, shape=shape, is_cuda=is_cuda, device=device, numel=lambda: length * size)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, True),
        ({"dtype": torch.float16, "size": 256}, True),
        ({"dtype": torch.float32}, False),
        ({"size": 60}, False),
        ({"size": 264}, False),
        ({"length": 0}, False),
        ({"is_cuda": False}, False),
    ],
    ids=str,
)
def test_what_the_kernel_takes(monkeypatch, given, taken):
    attention.load_compiled_parts()
    monkeypatch.setattr(attention, "_flash_ragged", object())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert attention._flash_takes(query(**given)) == taken
    # older chips, other makers, other versions of torch
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not attention._flash_takes(query())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not attention._flash_takes(query())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(attention, "_flash_ragged", None)
    assert not attention._flash_takes(query())
