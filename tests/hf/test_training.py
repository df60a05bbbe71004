"""Training with the library's tools: checkpointed activations, the Trainer, adapters."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer

from hgrn2.hf import HGRN2ForCausalLM, HGRN2ForSequenceClassification
from tests.hf.cases import KINDS, Texts, arguments, both, hf_config, left_padded, losses, tokens
from tests.models.cases import FULL

# transformers renames what it still calls by the old name itself, as accelerate and peft do
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def checkpointed(model, reentrant):
    # renamed in transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [*KINDS, "clamp"])
def test_activations_computed_again_give_the_same_gradients(name, reentrant):
    _, model = both(name)
    model.train()
    ids, mask = left_padded([9, 5])
    labels = torch.where(mask.bool(), ids, -100)
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    calls = []
    # the mixers' projections, for hooks of a layer stay outside of what is run again
    for layer in model.model.layers:
        layer.attn.o_proj.register_forward_hook(lambda *_: calls.append(1))
    checkpointed(model, reentrant)
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    assert len(calls) == 6
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        torch.testing.assert_close(found[key], x, rtol=1e-12, atol=1e-12)
    # nothing is run twice in evaluation
    calls.clear()
    model.eval()
    model(ids, labels=labels).loss.backward()
    assert len(calls) == 3


@pytest.mark.parametrize("name", KINDS)
def test_activations_are_computed_again_as_in_our_own_model(name):
    own, model = both(name)
    ids = tokens(2, 12)
    own.train().activation_checkpointing = True
    checkpointed(model.train(), reentrant=False)
    own.loss(ids[:, :-1], ids[:, 1:]).sum.backward()
    model(ids, labels=ids, num_items_in_batch=1).loss.backward()
    for key, p in own.named_parameters():
        torch.testing.assert_close(gradients(model)[key], p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_through_a_cache(name, recompute):
    _, model = both(name)
    ids = tokens(2, 12)
    model(ids, labels=ids, num_items_in_batch=1).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    model.train()
    if recompute:
        checkpointed(model, False)
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    cache, loss = None, 0
    for part, target in zip(ids.split(5, 1), targets.split(5, 1), strict=True):
        out = model(part, shift_labels=target, num_items_in_batch=1, use_cache=True, past_key_values=cache)
        cache, loss = out[1 if out.loss is None else 2], loss + out.loss
    loss.backward()
    for key, x in gradients(model).items():
        torch.testing.assert_close(x, wanted[key], rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fla", "window-attention"])
def test_an_epoch_with_the_trainer(name, tmp_path):
    torch.manual_seed(0)
    model = HGRN2ForCausalLM(hf_config(name))
    args = arguments(tmp_path, gradient_checkpointing=True)
    trainer = Trainer(model=model, args=args, train_dataset=Texts(120), eval_dataset=Texts(8))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    # a guess is 3.37; the first token cannot be known better, the others can
    assert before > 3.2
    assert after < 1.5
    trainer.save_model(str(tmp_path / "tuned"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    ids = tokens(1, 9)
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


def test_accumulated_batches_are_one_batch(tmp_path):
    found = []
    for size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = HGRN2ForCausalLM(hf_config("fla"))
        args = arguments(tmp_path, gradient_accumulation_steps=steps)
        args.per_device_train_batch_size = size
        # texts of different lengths: a mean of means would be another number
        data = [{"input_ids": (x := Texts(16)[i]["input_ids"][: 4 + i % 3 * 4]), "labels": x} for i in range(16)]
        trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=padded)  # pyright: ignore
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert len(found[0]) == 2


def padded(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def test_rows_packed_by_the_library_are_trained_as_if_alone(tmp_path):
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=True)
    rows = [{"input_ids": Texts(4)[i]["input_ids"][: 5 + i]} for i in range(3)]
    _, model = both("full-attention")
    out = model(**collate(rows))
    # three labels fewer: no text predicts the first token of the next
    summed = sum(model(ids := torch.tensor([row["input_ids"]]), labels=ids, num_items_in_batch=1).loss for row in rows)
    torch.testing.assert_close(out.loss * (5 + 6 + 7 - 3), summed)


def test_a_classifier_is_trained(tmp_path):
    torch.manual_seed(0)
    model = HGRN2ForSequenceClassification(hf_config("fla", num_labels=2))
    texts = [[(i * 7 + j) % 14 + 14 * (i % 2) for j in range(6)] for i in range(80)]
    rows = [{"input_ids": text, "attention_mask": [1] * 6, "labels": i % 2} for i, text in enumerate(texts)]
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows, eval_dataset=rows[:10])  # pyright: ignore
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.2


def test_every_parameter_gets_a_gradient():
    for name in (*KINDS, "bias", "mixer-layernorm", "block-layernorm", "no-bound"):
        _, model = both(name)
        ids = tokens(2, 9)
        model.train()(ids, labels=ids).loss.backward()
        for key, p in model.named_parameters():
            assert p.grad is not None, (name, key)
            # a shift of all keys of a query changes no attention weight
            if not key.endswith("k_proj.bias"):
                assert p.grad.abs().sum() > 0, (name, key)


@pytest.mark.parametrize("attending", [[1, 2], [0, 1, 2]])
def test_bounds_that_no_later_layer_uses_have_a_gradient_of_zeros(attending):
    # DistributedDataParallel waits for one
    model = HGRN2ForCausalLM(hf_config("fla", attn=FULL | {"layers": attending})).bfloat16()
    ids = tokens(2, 9)
    out = model.train()(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not model.model.lower_bounds.grad.any()


def test_gradients_of_hidden_states():
    _, model = both("window-attention")
    ids = tokens(2, 9)
    out = model(ids, labels=ids, output_hidden_states=True)
    for x in out.hidden_states:
        x.retain_grad()
    out.loss.backward()
    assert all(x.grad.abs().sum() > 0 for x in out.hidden_states)


@pytest.mark.slow
def test_a_compiled_training_step():
    torch._dynamo.reset()
    _, model = both("window-attention")
    model.train()
    ids, mask = left_padded([9, 5])
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    step(ids, attention_mask=mask, labels=ids).loss.backward()
    for key, x in gradients(model).items():
        torch.testing.assert_close(x, wanted[key], rtol=1e-10, atol=1e-12)
