"""Memory of training on several GPUs: parts add up, and sharing divides them."""

import pytest

from hgrn2.models import presets
from hgrn2.models.cost import cost
from hgrn2.models.memory import memory_plans


def test_plans():
    config = presets.m150()
    found = cost(config, 2048)
    one, recomputed = memory_plans(config, 1, 4 * 2048, 2048)
    assert one.gradients + one.optimizer == 12 * found.parameters
    assert one.activations == 4 * 2048 * found.activation_bytes_per_token_bfloat16
    assert recomputed.activations < one.activations
    plans = {plan.settings: plan for plan in memory_plans(config, 4, 4 * 2048, 2048)}
    assert plans[""].weights == one.weights
    assert plans[""].activations == one.activations // 4
    assert plans["--shard"].optimizer == pytest.approx(one.optimizer / 4, abs=4)
    order = [plan.total for plan in plans.values()]
    assert plans["--shard --activation-checkpointing"].total == min(order)
    assert plans["--shard"].total < plans["--shard --no-reshard"].total < plans[""].total
