"""Parameters under DistributedDataParallel, which stops where one that asks for a gradient gets none."""

import pytest
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tests.models.cases import FULL, config_of, make_model, tokens

HYBRIDS = {
    "the first layer alone recurs": [1, 2],
    "the last layer alone recurs": [0, 1],
    "two layers recur": [1],
    "no layer recurs": [0, 1, 2],
}


@pytest.fixture
def one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("attending", HYBRIDS.values(), ids=HYBRIDS)
def test_two_steps(one_process, attending):
    model = make_model(config_of("fla").replace(attn=FULL | {"layers": attending}))
    parallel = DistributedDataParallel(model)
    for seed in range(2):
        logits, _ = parallel(tokens(2, 5, seed=seed))
        logits.logsumexp(-1).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert bool(model.model.lower_bounds.grad.any()) == any(i not in attending for i in (1, 2))
