"""Classes for transformers under vmap, against a loop."""

import pytest
import torch

pytest.importorskip("transformers")
from torch.func import vmap

from hgrn2.hf import HGRN2Config, HGRN2ForCausalLM
from tests.refusals import refuses

pytestmark = pytest.mark.filterwarnings("ignore:.*_scaled_dot_product_flash_attention_for_cpu:UserWarning")


@pytest.fixture
def model():
    config = HGRN2Config(vocab_size=17, hidden_size=16, num_hidden_layers=2, expand_ratio=8, intermediate_size=24)
    torch.manual_seed(0)
    return HGRN2ForCausalLM(config).eval()


def test_vmap_over_tokens_and_masks(model):
    ids, mask = torch.randint(17, (3, 2, 5)), torch.ones(3, 2, 5, dtype=torch.long)
    mask[0, 1, :2] = 0

    def run(ids, mask):
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    found = vmap(run)(ids, mask)
    for i in range(3):
        torch.testing.assert_close(found[i][mask[i] > 0], run(ids[i], mask[i])[mask[i] > 0])


def test_positions_that_vmap_maps_over_are_refused(model):
    ids, places = torch.randint(17, (1, 5)), torch.arange(5).expand(2, 1, -1)
    with refuses("unsupported", "position_ids"):
        vmap(lambda x: model(input_ids=ids, position_ids=x, use_cache=False).logits)(places)
