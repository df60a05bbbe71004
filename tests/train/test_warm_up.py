"""Compiling ahead, while a model is built: it fails silently, and changes neither random numbers nor data."""

from __future__ import annotations

import sys

import pytest
import torch

from hgrn2.models import HGRN2LM, HGRN2Config, presets
from hgrn2.train import warm_up
from hgrn2.train.config import TrainConfig
from tests.train.tiny_run import TinyModel, TinyTask

TRAIN = TrainConfig(max_steps=1, batch_size=2, compile=True)
ATTENTION = {"num_heads": 2}


class TinyModelWithRoles(TinyModel):
    def parameter_roles(self):
        return {name: "vector" for name, _ in self.named_parameters()}


def test_the_compiler_is_imported_and_random_numbers_stay():
    torch.manual_seed(0)
    wanted = torch.randn(1000)
    torch.manual_seed(0)
    with warm_up.warming_up(lambda: HGRN2LM(presets.tiny()), TinyTask(TRAIN), TRAIN, torch.device("cpu")):
        assert torch.equal(torch.randn(1000), wanted)
    assert "torch._inductor.compile_fx" in sys.modules


@pytest.mark.parametrize("bad_batches", [(), (1,)])
def test_a_step_of_the_shallow_model_leaves_the_task_where_it_was(bad_batches):
    task, untouched = (TinyTask(TRAIN, bad_batches) for _ in range(2))
    for one in (task, untouched):
        one.next_batch()
    model = TinyModelWithRoles(dropout=0.0)
    before = model.hidden.weight.detach().clone()
    warm_up.run_step(model, task, TRAIN)
    assert torch.equal(model.hidden.weight, before) == (1 in bad_batches)
    assert task.position == untouched.position == 1
    assert torch.equal(task.carried, untouched.carried)


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ({"num_hidden_layers": 4}, ["hgrn2"]),
        ({"num_hidden_layers": 6, "layers": ["hgrn2", "hgrn2", "attention"], "mixers": {"attention": ATTENTION}},
         ["hgrn2", "attention"]),
        ({"num_hidden_layers": 4, "attn": {"layers": [0], **ATTENTION}}, ["attention", "hgrn2"]),
        ({"num_hidden_layers": 4, "layers": ["mamba", "rwkv6"], "mixers": {"mamba": {"state_size": 8}}},
         ["mamba", "rwkv6"]),
    ],
)  # fmt: skip
def test_a_shallow_model_has_one_layer_of_each_mixer(layers, wanted):
    config = HGRN2Config(vocab_size=10, hidden_size=128, expand_ratio=16, **layers)
    shallow = warm_up.one_layer_of_each(config)
    assert list(shallow.layer_mixers) == wanted
    assert shallow.intermediate_size == config.intermediate_size
    for name in wanted:
        assert shallow.mixer_options(name) == config.mixer_options(name)


def test_a_failure_is_left_to_the_first_step(monkeypatch):
    def fail(name):
        raise RuntimeError(name)

    monkeypatch.setattr(warm_up.importlib, "import_module", fail)
    with warm_up.warming_up(None, TinyTask(TRAIN), TRAIN, torch.device("cpu")):
        pass
