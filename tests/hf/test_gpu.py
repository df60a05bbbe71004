"""The classes of transformers on a CUDA device: the kernels under `generate`, graphs, placement, training."""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hgrn2.hf import HGRN2Config, HGRN2ForCausalLM
from hgrn2.models import HGRN2LM
from hgrn2.ops import resolve_backend
from tests.hf.cases import KINDS, both, continued, left_padded, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GREEDY = {"do_sample": False, "max_new_tokens": 6}
# wide enough for every kernel
WIDE = {"hidden_size": 256, "expand_ratio": 128, "num_hidden_layers": 3, "vocab_size": 300, "intermediate_size": 512}


def wide_pair(dtype, **keys):
    torch.manual_seed(0)
    model = HGRN2ForCausalLM(HGRN2Config(**WIDE, **keys))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    model = model.to("cuda", dtype).eval()
    own = HGRN2LM(model.config.model_config).to("cuda", dtype).eval()
    own.load_state_dict(model.state_dict())
    return own, model


@pytest.mark.parametrize("name", KINDS)
def test_generating_is_the_plain_loop(name):
    own, model = (x.cuda() for x in both(name))
    lengths = [8, 3, 1]
    ids, mask = (x.cuda() for x in left_padded(lengths))
    found = model.generate(ids, attention_mask=mask, **GREEDY)
    for i, n in enumerate(lengths):
        assert torch.equal(found[i : i + 1, -n - 6 :], continued(own, ids[i : i + 1, -n:], 6))
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY)
    assert torch.equal(beams, model.generate(ids, attention_mask=mask, num_beams=3, use_cache=False, **GREEDY))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_static_caches_are_compiled_there(name):
    own, model = (x.cuda() for x in both(name, torch.float32))
    ids = tokens(2, 9).cuda()
    # a static cache on a GPU means a compiled step, replayed as a CUDA graph
    found = model.generate(ids, cache_implementation="static", do_sample=False, max_new_tokens=12)
    assert torch.equal(found, continued(own, ids, 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_wide_heads_take_the_kernels(dtype):
    own, model = wide_pair(dtype)
    assert resolve_backend("auto", torch.device("cuda", 0), dtype, 128, 128) in ("triton", "cuda")
    ids = torch.randint(300, (2, 200), device="cuda")
    wanted, state = own(ids)
    out = model(ids, use_cache=True)
    assert torch.equal(out.logits, wanted)
    token = wanted[:, -1:].argmax(-1)
    cache = next(value for name, value in out.items() if name in ("cache", "past_key_values"))
    name = next(name for name in out if name in ("cache", "past_key_values"))
    assert torch.equal(model(token, **{name: cache}).logits, own(token, state)[0])


def test_placed_by_device_map(tmp_path):
    _, model = wide_pair(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    ids = torch.randint(300, (1, 70), device="cuda")
    for place in ("auto", "cuda:0"):
        again = HGRN2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map=place).eval()
        assert {parameter.device.type for parameter in again.parameters()} == {"cuda"}
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_trainer_with_checkpointed_gradients(tmp_path):
    _, model = wide_pair(torch.float32)
    pattern = torch.randint(300, (65,))
    data = [{"input_ids": pattern, "labels": pattern}] * 8
    settings = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=12, learning_rate=1e-3, bf16=True,
        gradient_checkpointing=True, logging_steps=1, report_to=[], save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
