"""The sequence classifier: padding, pooling, pairs, BatchNorm, and directions, against single sequences."""

import pytest
import torch

from hgrn2.models import HGRN2Config
from hgrn2.models.classifier import ClassifierOptions, SequenceClassifier
from hgrn2.nn.batch_norm import BatchNorm
from hgrn2.nn.parameters import check_roles
from tests.refusals import refuses

CONFIG = HGRN2Config(vocab_size=17, hidden_size=32, num_hidden_layers=2, expand_ratio=8, intermediate_size=32)
LENGTHS = torch.tensor([30, 12, 1])


def made(config=CONFIG, **options):
    torch.manual_seed(0)
    model = SequenceClassifier(config, ClassifierOptions(**({"num_classes": 10} | options))).double()
    # bounds and biases other than 0 show what is left out
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
@pytest.mark.parametrize("directions", ["bidirectional", "alternating", "causal"])
def test_padding_changes_neither_logits_nor_gradients(pooling, directions):
    model = made(pooling=pooling, directions=directions, positions=30)
    ids = torch.randint(17, (3, 30))
    padded = model(ids, LENGTHS)
    alone = torch.cat([model(ids[i : i + 1, :n]) for i, n in enumerate(LENGTHS)])
    torch.testing.assert_close(padded, alone)
    weights = torch.randn_like(padded)
    parameters = list(model.parameters())
    found = torch.autograd.grad((padded * weights).sum(), parameters, allow_unused=True)
    wanted = torch.autograd.grad((alone * weights).sum(), parameters, allow_unused=True)
    for name, a, b in zip(dict(model.named_parameters()), found, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("mixer", ["hgrn1", "attention", "mamba"])
def test_every_rival_pads(mixer):
    options = {"mixers": {"attention": {"num_heads": 2}}} if mixer == "attention" else {}
    model = made(CONFIG.replace(layers=(mixer,), **options))
    ids = torch.randint(17, (3, 30))
    alone = torch.cat([model(ids[i : i + 1, :n]) for i, n in enumerate(LENGTHS)])
    torch.testing.assert_close(model(ids, LENGTHS), alone)


def test_mean_pooling_is_the_mean_of_the_hidden_states():
    model = made()
    ids = torch.randint(17, (1, 9))
    torch.testing.assert_close(model.encode(ids), model.hidden_states(ids).mean(1))


def test_pairs_share_weights():
    model = made(num_sequences=2, num_classes=2, head_hidden_size=24)
    ids, lengths = torch.randint(17, (3, 2, 20)), torch.tensor([[20, 5], [3, 20], [1, 1]])
    x, y = (model.encode(ids[:, i], lengths[:, i]) for i in (0, 1))
    joined = torch.cat([x, y, x * y, (x - y).abs()], -1)
    wanted = model.head(torch.nn.functional.gelu(model.head_hidden(joined)))
    torch.testing.assert_close(model(ids, lengths), wanted)
    with refuses("invalid-value", "inputs", "[3, 20]"):
        model(ids[:, 0])


def test_values_and_a_grid():
    model = made(input="values", channels=3, directions="2d", grid_width=8)
    values = torch.randn(2, 48, 3, dtype=torch.float64)
    assert model(values).shape == (2, 10)
    # the transpose of an image is another image: rows are rows
    turned = values.view(2, 6, 8, 3).transpose(1, 2).reshape(2, 48, 3)
    assert not torch.allclose(model(values), made(input="values", channels=3, directions="2d", grid_width=8)(turned))
    with refuses("mismatch", 48, 7):
        made(input="values", channels=3, directions="2d", grid_width=7)(values)


def test_batch_norm_is_that_of_all_tokens():
    norm = BatchNorm(8, 1e-5).double()
    x = torch.randn(4, 5, 8, dtype=torch.float64) * 3 + 1
    wanted = (x - x.mean((0, 1))) / (x.var((0, 1), unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), wanted)
    for _ in range(200):
        norm(x)
    norm.eval()
    torch.testing.assert_close(norm(x), wanted, atol=0.1, rtol=0.1)
    model = made(batch_norm=True)
    assert sum(isinstance(m, BatchNorm) for m in model.modules()) == 4
    assert torch.isfinite(model(torch.randint(17, (3, 30)))).all()
    with refuses("contradiction", "batch_norm"):
        model(torch.randint(17, (3, 30)), LENGTHS)


def test_roles_and_refusals():
    for options in ({}, {"input": "values"}, {"positions": 8, "head_hidden_size": 4}):
        model = made(**options)
        check_roles(model, model.parameter_roles())
        assert model.parameter_roles()["lower_bounds"] == "lower_bounds"
    with refuses("mismatch", 9, 8):
        made(positions=8)(torch.randint(17, (1, 9)))
    with refuses("invalid-value", "inputs"):
        made()(torch.zeros(1, 9, 2))
    with refuses("unknown-name", "bidirectionl", "bidirectional"):
        made(directions="bidirectionl")
    with refuses("invalid-value", "num_sequences", 3):
        ClassifierOptions(num_sequences=3)


def test_checkpointed_activations_give_the_same_gradients():
    model = made()
    ids = torch.randint(17, (3, 30))
    wanted = torch.autograd.grad(model(ids, LENGTHS).sum(), model.head.weight)[0]
    model.activation_checkpointing = True
    torch.testing.assert_close(torch.autograd.grad(model(ids, LENGTHS).sum(), model.head.weight)[0], wanted)
