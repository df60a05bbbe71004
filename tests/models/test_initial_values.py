"""Initial values depend on the seed alone: the draws of torch's constructors are skipped, and counted."""

import pytest
import torch
from torch import nn

from hgrn2.models import HGRN2LM
from hgrn2.nn.parameters import SkippedDraws
from tests.models.cases import CHANGES, config_of


@pytest.mark.parametrize("variant", CHANGES)
def test_a_seed_gives_the_weights_that_it_gives_with_the_constructors_draws(variant, monkeypatch):
    config = config_of(variant)
    torch.manual_seed(5)
    found = HGRN2LM(config).state_dict()
    following = torch.rand(3)
    # a mode that intercepts nothing
    monkeypatch.setattr(SkippedDraws, "_UNIFORM", frozenset())
    torch.manual_seed(5)
    wanted = HGRN2LM(config).state_dict()
    assert torch.equal(torch.rand(3), following)
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1200, 1000)])
def test_weights_are_not_written_and_the_generator_advances(shape):
    torch.manual_seed(1)
    nn.Linear(*shape, bias=True)
    wanted = torch.rand(20)
    torch.manual_seed(1)
    with SkippedDraws():
        linear = nn.Linear(*shape, bias=True)
    assert torch.equal(torch.rand(20), wanted)
    nn.init.ones_(linear.weight)
    with SkippedDraws():
        linear.reset_parameters()
    assert linear.weight.eq(1).all()


def test_draws_that_count_differently_are_not_skipped():
    x = torch.zeros(4, dtype=torch.float64)
    with SkippedDraws():
        nn.init.uniform_(x)
        y = nn.init.uniform_(torch.zeros(4), generator=torch.Generator().manual_seed(0))
    assert x.all()
    assert y.all()
