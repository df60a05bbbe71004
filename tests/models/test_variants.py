# pyright: reportArgumentType=false

import pytest
import torch

from tests.models import transcription
from tests.models.cases import NAMES, config_of, make_model, tokens

# gradients of everything, for the variants whose parts differ most
WITH_GRADIENTS = [
    "signed",
    "dense",
    "dense-signed",
    "dense-clamp",
    "fla",
    "paper",
    "official-lm",
    "official-lra",
    "short-conv-2-bias",
    "tied",
    "window-attention",
]


def parameters(model):
    return dict(model.named_parameters(remove_duplicate=False))


def assert_close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", [name for name in NAMES if config_of(name).layers is None])
def test_a_variant_is_its_transcription(name, training):
    config = config_of(name)
    model = make_model(config).train(training)
    ids = tokens(2, 13)
    with torch.no_grad():
        found, _ = model(ids)
        wanted = transcription.logits(config, parameters(model), ids, training)
    assert_close(found, wanted)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_of_all_parameters(name):
    config = config_of(name)
    model = make_model(config).train()
    ids, targets = tokens(2, 11), tokens(2, 11, seed=2)
    leaves = parameters(model)

    def loss(x):
        return torch.nn.functional.cross_entropy(x.flatten(0, 1), targets.flatten(), reduction="sum")

    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(loss(model(ids)[0]), [leaves[n] for n in names])
    wanted = torch.autograd.grad(loss(transcription.logits(config, leaves, ids, True)), [leaves[n] for n in names])
    for name, one, two in zip(names, found, wanted, strict=True):
        assert two.abs().max() > 0, name
        assert_close(one, two)


def test_the_decay_clamp_holds_in_training_alone():
    model = make_model(config_of("clamp"))
    ids = tokens(1, 9)
    with torch.no_grad():
        assert not torch.allclose(model(ids)[0], model.train()(ids)[0])


@pytest.mark.parametrize("name", ["fla", "official-lra", "short-conv", "window-attention"])
def test_in_single_precision(name):
    config = config_of(name)
    model = make_model(config, torch.float32)
    exact = make_model(config)
    ids = tokens(2, 70)
    with torch.no_grad():
        found, wanted = model(ids)[0].double(), exact(ids)[0]
    assert (found - wanted).norm() / wanted.norm() < 2e-5


def test_dropout_works_in_training_alone():
    model = make_model(config_of("fla").replace(dropout=0.5))
    ids = tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(model(ids)[0], model(ids)[0])
        assert not torch.equal(model.train()(ids)[0], model(ids)[0])
