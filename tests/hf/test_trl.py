"""TRL's trainers, with a folder's name and with a model; packed documents see nothing of each other."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn import functional
from transformers import AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hgrn2.data import train_bpe
from hgrn2.data.transformers_files import write_transformers_files
from hgrn2.hf import HGRN2ForCausalLM, HGRN2ForSequenceClassification
from tests.hf.cases import KINDS, both, hf_config, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory. argument is set as true but no accelerator:UserWarning"),
]
STEPS = 5
TEXTS = ["Once upon a time", "it rained and rained", "and then it stopped", "nobody had one"] * 5
PAIRS = [
    {"prompt": "Once", "chosen": " upon a time", "rejected": " nobody"},
    {"prompt": "it", "chosen": " rained", "rejected": " upon"},
] * 5
PROMPTS = [{"prompt": "Once"}, {"prompt": "it rained and"}] * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    own = train_bpe(["Once upon a time it rained, and then it stopped again"], 270)
    HGRN2ForCausalLM(hf_config("fla", vocab_size=own.vocab_size)).save_pretrained(path)
    own.save(path)
    write_transformers_files(own, path)
    return path


@pytest.fixture(params=["by name", "as an object"])
def make(request, folder):
    """Makes the model argument of a trainer."""
    if request.param == "by name":
        return lambda cls=HGRN2ForCausalLM, **keys: str(folder)
    return lambda cls=HGRN2ForCausalLM, **keys: cls.from_pretrained(folder, **keys)


def train(trainer, config, model, rows, folder, **keys):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trained = trainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **keys)
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters() if p.requires_grad}
    trained.train()
    assert trained.state.global_step == STEPS
    moved = {
        name for name, p in trained.model.named_parameters() if name in before and not torch.equal(p, before[name])
    }
    # the first row of the bounds has no effect, but the others have
    assert moved == set(before)
    return trained


def settings(cls, tmp_path, **keys):
    return cls(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, bf16=False, logging_steps=1, **keys,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"packing": True, "max_length": 16},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
        {"padding_free": True, "max_length": None},
    ],
    ids=["padded", "packed", "wrapped", "padding-free"],
)
def test_supervised(make, keys, folder, tmp_path):
    config = settings(SFTConfig, tmp_path, **keys)
    trained = train(SFTTrainer, config, make(), [{"text": text} for text in TEXTS], folder)
    found = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert found[-1] < found[0]
    trained.save_model(str(tmp_path / "out"))
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    HGRN2ForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_preferences(make, folder, tmp_path):
    # without a reference model, of which TRL makes one by the folder's name
    train(DPOTrainer, settings(DPOConfig, tmp_path), make(), PAIRS, folder)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rewarded_completions(make, beta, folder, tmp_path):
    config = settings(GRPOConfig, tmp_path, num_generations=2, max_completion_length=5, beta=beta)
    random = iter(range(1000))
    train(
        GRPOTrainer, config, make(), PROMPTS, folder,
        reward_funcs=lambda completions, **_: [float(next(random) * 7 % 5) for _ in completions],
    )  # fmt: skip


@pytest.mark.slow
def test_a_reward_model(make, folder, tmp_path):
    model = make(HGRN2ForSequenceClassification, num_labels=1)
    train(RewardTrainer, settings(RewardConfig, tmp_path), model, PAIRS, folder)


def test_an_adapter(folder, tmp_path):
    config = settings(SFTConfig, tmp_path, packing=True, max_length=16)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trained = train(SFTTrainer, config, str(folder), [{"text": text} for text in TEXTS], folder, peft_config=lora)
    assert all("lora_" in name for name, p in trained.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_packed_documents_are_as_if_alone(name, rows):
    # as TRL's collator hands them over: rows of packed documents are joined to one
    _, model = both(name)
    lengths = [[5, 1, 6], [3, 9]][:rows]
    ids = [tokens(1, sum(row), seed=i)[0].tolist() for i, row in enumerate(lengths)]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([{"input_ids": x, "seq_lengths": row} for x, row in zip(ids, lengths, strict=True)])
    assert {"position_ids", "cu_seq_lens_q", "seq_idx"} < set(batch)
    out = model(**batch)
    documents = torch.cat([torch.tensor(x) for x in ids])[None].split([n for row in lengths for n in row], 1)
    torch.testing.assert_close(out.logits, torch.cat([model(x).logits for x in documents], 1), rtol=1e-10, atol=1e-10)
    losses = [
        functional.cross_entropy(model(x).logits[0, :-1], x[0, 1:], reduction="sum")
        for x in documents
        if x.shape[1] > 1
    ]
    count = sum(x.shape[1] - 1 for x in documents)
    torch.testing.assert_close(out.loss, torch.stack(losses).sum() / count)


@pytest.mark.slow
def test_packing_and_padding_give_one_loss(folder, tmp_path):
    found = []
    for keys in ({}, {"padding_free": True, "max_length": None}):
        config = settings(SFTConfig, tmp_path, **keys)
        rows = [{"text": text} for text in TEXTS]
        trained = train(SFTTrainer, config, HGRN2ForCausalLM.from_pretrained(folder), rows, folder)
        found.append([entry["loss"] for entry in trained.state.log_history if "loss" in entry])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
