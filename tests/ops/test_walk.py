"""The path of a call from a mixer to a kernel is short: files on the stack when the kernel runs."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch

import hgrn2
from hgrn2.nn import HGRN2Mixer
from hgrn2.ops.backends import find

ROOT = Path(hgrn2.__file__).parent
MIXER = "nn/mixers/hgrn2.py"
KERNELS = {
    "chunked": "ops/backends/chunked/joins.py",
    "triton": "ops/backends/triton/chunk_fwd.py",
    "narrow": "ops/backends/narrow/kernels.py",
}


def files_to(kernel: str, call) -> set[tuple[str, ...]]:
    """Every chain of the package's files, from the mixer on, that leads to a file."""
    chains = set()

    def watch(frame, event, arg):
        if event != "call" or not frame.f_code.co_filename.endswith(kernel):
            return
        files = []
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT):
                files.append(path.relative_to(ROOT).as_posix())
            frame = frame.f_back
        chain = [name for name, _ in groupby(reversed(files))]
        chains.add(tuple(chain[chain.index(MIXER) :]))

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return chains


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("learns", [False, True], ids=["inference", "training"])
def test_at_most_five_files_each_once(backend, learns):
    triton = find("triton")
    if backend != "chunked" and (triton.problem or not triton.is_interpreted):
        pytest.skip("Triton's interpreter runs no kernel here")
    layer = HGRN2Mixer(16, expand_ratio=16, backend=backend)
    x = torch.randn(1, 8, 16)
    with torch.set_grad_enabled(learns):
        layer(x)
        chains = files_to(KERNELS[backend], lambda: layer(x))
    assert chains
    for chain in chains:
        assert chain[-1] == KERNELS[backend]
        assert len(chain) == len(set(chain)) <= 5, chain
