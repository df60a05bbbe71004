"""What is prepared while a model is built: it fails silently, and leaves the random numbers of the CPU alone."""

from __future__ import annotations

import sys

import pytest
import torch

from hgrn2.models import HGRN2Config, presets
from hgrn2.train import warm_up
from hgrn2.train.config import TrainConfig

TRAIN = TrainConfig(max_steps=1, compile=True)


def test_the_compiler_is_imported_and_random_numbers_stay():
    torch.manual_seed(0)
    wanted = torch.randn(1000)
    torch.manual_seed(0)
    with warm_up.warming_up(presets.tiny(), TRAIN, torch.device("cpu")):
        assert torch.equal(torch.randn(1000), wanted)
    assert "torch._inductor.compile_fx" in sys.modules


@pytest.mark.parametrize("attn", [None, {"layers": [1], "num_heads": 2}])
def test_every_kind_of_mixer_runs(attn, monkeypatch):
    config = HGRN2Config(vocab_size=10, hidden_size=32, expand_ratio=16, num_hidden_layers=2, attn=attn)
    kinds = []
    build = HGRN2Config.build_mixer
    monkeypatch.setattr(HGRN2Config, "build_mixer", lambda self, i, *rest: kinds.append(i) or build(self, i, *rest))
    warm_up.run_mixers(config, TRAIN, torch.device("cpu"))
    assert len(kinds) == len(set(config.layer_mixers))


def test_a_failure_is_left_to_the_first_step(monkeypatch):
    def fail(name):
        raise RuntimeError(name)

    monkeypatch.setattr(warm_up.importlib, "import_module", fail)
    with warm_up.warming_up(None, TRAIN, torch.device("cpu")):
        pass
