from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def hostile_memory(nan_filled_memory):
    """Every test of the operator runs with NaN in fresh memory."""
    assert torch.empty(3).isnan().all()
