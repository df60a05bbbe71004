from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def hostile_memory(nan_filled_memory):
    """Every test of the operator runs with NaN in fresh memory."""
    assert torch.empty(3).isnan().all()


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tiny tensors: a second thread only adds its own cost."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
