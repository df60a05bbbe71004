"""Learning from another model's predictions."""

import pytest
import torch
from torch.nn import functional

from hgrn2.data.batches import Batch
from hgrn2.data.prepare import prepare
from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.nn.loss import linear_cross_entropy
from hgrn2.tasks import distillation as distill
from hgrn2.tasks.base import TaskContext
from hgrn2.tasks.distillation import DistillationOptions, DistillationTask, distillation_loss
from hgrn2.train.settings import RunSettings
from tests.refusals import refuses

V, M = 11, 9


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def inputs(monkeypatch):
    # several parts, the last of them short
    monkeypatch.setattr(distill, "ROWS", 4)
    targets = torch.arange(M) % V
    targets[3] = -100
    x, head = random(M, 5).requires_grad_(), random(V, 5, seed=1).requires_grad_()
    return x, head, random(M, 7, seed=2), random(V, 7, seed=3), targets


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.3, 2.5)])
def test_by_hand(weight, temperature, inputs):
    x, head, teacher_x, teacher_head, targets = inputs
    found = distillation_loss(x, head, teacher_x, teacher_head, targets, weight, temperature)
    wanted = torch.zeros((), dtype=torch.float64)
    for i in range(M):
        if targets[i] == -100:
            continue
        z, t = head @ x[i], teacher_head @ teacher_x[i]
        q, p = (torch.softmax(a / temperature, 0) for a in (z, t))
        cross_entropy = -torch.log(torch.softmax(z, 0)[targets[i]])
        wanted = wanted + (1 - weight) * cross_entropy + weight * temperature**2 * (p * (p / q).log()).sum()
    torch.testing.assert_close(found, wanted)
    for got, want in zip(torch.autograd.grad(found, (x, head)), torch.autograd.grad(wanted, (x, head)), strict=True):
        torch.testing.assert_close(got, want)


def test_without_weight_it_is_the_loss_of_the_text(inputs):
    x, head, teacher_x, teacher_head, targets = inputs
    found = distillation_loss(x, head, teacher_x, teacher_head, targets, 0.0, 1.0)
    torch.testing.assert_close(found, linear_cross_entropy(x, head, targets))


def test_from_itself_there_is_nothing_to_learn(inputs):
    x, head, _, _, targets = inputs
    loss = distillation_loss(x, head, x.detach(), head.detach(), targets, 1.0, 3.0)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (x, head)):
        assert gradient.abs().max() < 1e-14
    # and from another there is
    other = distillation_loss(x, head, x.detach() + 0.1, head.detach(), targets, 1.0, 3.0)
    assert other.item() > 1e-4
    assert torch.autograd.grad(other, x)[0].abs().max() > 1e-3


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HGRN2LM(HGRN2Config(vocab_size=V, hidden_size=8, num_hidden_layers=1, expand_ratio=4, intermediate_size=8))


def test_a_teacher_of_a_packed_batch(model, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "0.txt").write_text("a text of some words\n" * 40)
    data = prepare([str(tmp_path / "text")], "bytes", tmp_path / "prepared", progress=False)
    model_config = model.config.replace(vocab_size=257)
    model = HGRN2LM(model_config)
    teacher_model = HGRN2LM(model_config.replace(attn={"layers": [0], "num_heads": 2}))
    teacher_model.save(tmp_path / "teacher", data.tokenizer)
    options = DistillationOptions(
        seq_len=8, teacher=str(tmp_path / "teacher"), distill_weight=1.0, distill_temperature=2.0
    )
    task = DistillationTask.build(options, TaskContext(model_config=model_config, data=data))
    batch = Batch(
        input_ids=torch.arange(8).unsqueeze(0), targets=torch.arange(1, 9).unsqueeze(0),
        cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32),
    )  # fmt: skip
    loss = task.loss(model, batch)
    # documents do not see each other, in neither model
    logits = [
        torch.cat([m(batch.input_ids[:, a:b])[0] for a, b in ((0, 3), (3, 8))], 1)[0] for m in (model, teacher_model)
    ]
    q, p = (functional.log_softmax(z / 2, -1) for z in logits)
    torch.testing.assert_close(loss, 4 * (p.exp() * (p - q)).sum())
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def settings(**keys):
    return RunSettings.from_flat({"max_steps": 1} | keys)


def test_settings():
    found = settings(teacher="x", distill_weight=1.0, seq_len=8)
    assert found.task is DistillationTask
    assert found.options == DistillationOptions(teacher="x", distill_weight=1.0, seq_len=8)
    for name in ("distill_weight", "distill_temperature"):
        with pytest.warns(UserWarning, match=f"{name} has no effect with no teacher"):
            settings(**{name: 0.5})
    for name, value in (("distill_weight", 1.5), ("distill_temperature", 0), ("distill_temperature", 1e300)):
        with refuses("invalid-value", f"{name} is {value}"):
            settings(teacher="x", **{name: value})
    for teacher in ("", "a\0b"):
        with refuses("invalid-value", f"teacher is {teacher!r}"):
            settings(teacher=teacher)
    with refuses("contradiction", "teacher", "stream"):
        settings(teacher="x", stream=True)
