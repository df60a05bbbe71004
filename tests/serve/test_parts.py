"""Parts of the engine on their own."""

import pytest
import torch

from hgrn2.serve.decoding import DecodeStep
from hgrn2.serve.fused import FusedLayer
from hgrn2.serve.lookup import Lookup
from hgrn2.serve.mixer_steps import join_projections
from hgrn2.serve.pool import StatePool
from hgrn2.serve.prefix_cache import PrefixCache
from hgrn2.serve.row_linear import project_rows
from hgrn2.serve.scheduler import fair_shares
from tests.models.cases import config_of, make_model, tokens
from tests.ops.test_triton import PROBLEM


def test_shares_are_equal_and_use_the_budget():
    assert fair_shares([3, 100, 100], 50) == [3, 24, 23]
    assert fair_shares([5, 5], 100) == [5, 5]
    assert fair_shares([10] * 4, 3) == [1, 1, 1, 0]
    assert fair_shares([], 3) == []


def test_rows_are_copied_cleared_and_written_without_an_allocation():
    for name in ("fla", "full-attention", "window-attention"):
        model = make_model(config_of(name))
        pool = StatePool(model.state_spec(), 4, 16, "cpu")
        places = [x.data_ptr() for layer in pool.layers for x in layer.values()]
        _, state = model(tokens(2, 9))
        pool.write([2, 0], state)
        pool.copy(2, 1)
        pool.clear(2)
        more = tokens(3, 5, seed=4)
        found, _ = model(more, pool.read([1, 0, 2], 9))
        wanted, _ = model(more, state.select(torch.tensor([0, 1, -1])))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
        assert places == [x.data_ptr() for layer in pool.layers for x in layer.values()]
        assert pool.bytes_of(9) == pool.read([0], 9).num_bytes


def test_joined_projections_share_their_memory():
    one, two = torch.nn.Linear(3, 4), torch.nn.Linear(3, 5)
    x = torch.randn(2, 3)
    wanted = torch.cat([one(x), two(x)], 1)
    weight, bias = join_projections([one, two])
    torch.testing.assert_close(torch.nn.functional.linear(x, weight, bias), wanted)
    again, _ = join_projections([one, two])
    assert again.data_ptr() == weight.data_ptr() == one.weight.data_ptr()
    with torch.no_grad():
        two.weight.fill_(2.0)
    assert weight[4:].eq(2).all()
    # a projection that is joined with others is joined anew
    other, _ = join_projections([two, one])
    assert torch.equal(other, torch.cat([two.weight, one.weight]))


def test_the_longest_prefix_is_found_and_never_another_text():
    state = make_model(config_of("fla")).init_state(1)
    cache = PrefixCache(10**6, 1.0)
    for length in (3, 8):
        cache.add(range(length), state)
    assert cache.find(range(20)).num_tokens == 8
    # a prompt of 8 tokens has no use for their state without the logits
    assert cache.find(range(8)).num_tokens == 3
    assert cache.find([0, 1, 2, 9]).num_tokens == 3
    assert cache.find([1, 2, 3]) is None
    cache.add([7, 7], state, torch.ones(5))
    assert cache.find([7, 7]).logits.sum() == 5
    assert cache.branch([0, 1, 2, 3, 9]) == 4
    cache.clear()
    assert cache.find(range(20)) is None


def test_drafts_follow_the_longest_match():
    assert Lookup([1, 2, 3]).draft(3) == []
    assert Lookup([5, 6, 7, 8, 5, 6]).draft(3) == [7, 8, 5]
    # after 1 2 3, not after the later 2 3
    assert Lookup([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]).draft(1) == [4]


@pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("name", ["fla", "bias", "block-rmsnorm-plain", "q-none"])
def test_fused_layers_compute_what_the_model_computes(name, rows):
    """In Triton's interpreter, with the recurrence in torch."""
    model = make_model(config_of(name), torch.float32)
    ids = tokens(rows, 8)
    _, state = model(ids)
    pool = StatePool(model.state_spec(), rows, 1, "cpu")
    pool.write(range(rows), state)
    step = DecodeStep(model, pool.grows)
    assert step.fused is None
    step.fused = [FusedLayer(layer) for layer in step.layers]
    more = tokens(rows, 3, seed=9)
    wanted, state = model(more, state)
    for t in range(3):
        found = step(more[:, t], pool.view(0, rows))
        torch.testing.assert_close(found, wanted[:, t], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pool.layers[-1]["recurrent"], state.layers[-1]["recurrent"], rtol=1e-4, atol=1e-4)


def test_one_row_in_16_bits_is_as_exact_as_many():
    linear = torch.nn.Linear(300, 50).bfloat16()
    x = torch.randn(2, 300).bfloat16()
    wide = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    for rows in (1, 2):
        found = project_rows(linear, x[:rows])
        assert (found - wide[:rows]).norm() < 4e-3 * wide[:rows].norm()
    # what hangs on a projection is called
    linear.register_forward_hook(lambda module, given, y: y * 0)
    assert not project_rows(linear, x[:1]).any()
