"""Adapters of PEFT: trained, read again, merged; and what a recurrent model has no place for."""

import pytest
import torch
from peft import (
    CPTConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, Trainer

from hgrn2.hf import HGRN2ForCausalLM
from tests.hf.cases import KINDS, Texts, arguments, both, hf_config, left_padded, losses, tokens
from tests.refusals import refuses

# transformers renames what it still calls by the old name itself, as accelerate and peft do
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
PROJECTIONS = ["q_proj", "f_proj", "i_proj", "o_proj"]
CAUSAL = {"task_type": "CAUSAL_LM"}


@pytest.mark.slow
@pytest.mark.parametrize("targets", [PROJECTIONS, "all-linear"])
def test_adapters(targets, tmp_path):
    torch.manual_seed(0)
    base = HGRN2ForCausalLM(hf_config("short-conv"))
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trained)
    wrapped = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained}
    mlp = {"gate_proj", "up_proj", "down_proj"} if targets == "all-linear" else set()
    assert wrapped == set(PROJECTIONS) | mlp
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = Trainer(model=model, args=arguments(tmp_path, gradient_checkpointing=True), train_dataset=Texts(60))
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    model.save_pretrained(str(tmp_path / "adapter"))
    ids = tokens(1, 9)
    wanted = model.eval()(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    torch.testing.assert_close(again(ids).logits, wanted)
    merged = again.merge_and_unload()
    assert type(merged) is HGRN2ForCausalLM
    torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged.generate(ids, max_new_tokens=3), model.generate(input_ids=ids, max_new_tokens=3))


def test_an_adapter_of_the_head_is_in_the_loss():
    _, base = both("fla")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    ids = tokens(2, 9)
    out = model(ids, labels=ids)
    wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, wanted)
    out.loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unsupported layer type .*Norm:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["i_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL),
        LNTuningConfig(target_modules=["attn_norm", "mlp_norm"], **CAUSAL),
        LoraConfig(r=2, target_modules=[*PROJECTIONS, "embeddings", "lm_head"], **CAUSAL),
        LoraConfig(r=2, target_modules=["f_proj"], use_dora=True, **CAUSAL),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], **CAUSAL),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2], layers_to_transform=[1], **CAUSAL),
        LoraConfig(r=2, target_modules=[], target_parameters=["lower_bounds"], **CAUSAL),
    ],
    ids=["ia3", "norms", "lora of ends", "dora", "lora and a head", "lora and tokens", "lora of bounds"],
)
@pytest.mark.parametrize("name", ["fla", "window-attention"])
def test_every_adapter_is_read_again_and_merged(name, config, tmp_path):
    _, base = both(name)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config)
    ids = tokens(2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, key
                parameter.add_(torch.randn_like(parameter) / 4)
    model.eval()
    wanted = model(input_ids=ids).logits
    assert not torch.allclose(wanted, both(name)[1](ids).logits)
    model.save_pretrained(str(tmp_path / "adapter"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, wanted)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, wanted)


def test_adapters_that_are_not_merged_are_not_saved_as_a_model(tmp_path):
    _, base = both("fla")
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["lower_bounds"], init_lora_weights=False)
    model = get_peft_model(base, config)
    ids = tokens(2, 9)
    wanted = model(ids).logits
    # the parameter's wrapper is around the layers: PEFT does not reach what lies in it
    once = model.merge_and_unload()
    with refuses("unsupported", "out: 3", "model.layers.0.attn.q_proj"):
        once.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.merge_and_unload().save_pretrained(tmp_path / "out")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, wanted)


def test_an_adapter_added_by_transformers_is_saved_alone(tmp_path):
    _, base = both("fla")
    base.save_pretrained(tmp_path / "base")
    base.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    base.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*"))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    ids = tokens(2, 9)
    torch.testing.assert_close(again(ids).logits, base(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
        PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **CAUSAL),
        CPTConfig(cpt_token_ids=[1, 2, 3], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3], **CAUSAL),
    ],
    ids=["prompt tuning", "p-tuning", "cpt"],
)
@pytest.mark.parametrize("name", KINDS)
def test_virtual_tokens_before_padded_prompts(name, config):
    torch.manual_seed(0)
    _, base = both(name, torch.float32, pad_token_id=0)
    tuned = get_peft_model(base, config).eval()
    lengths = [5, 2, 1]
    ids, mask = left_padded(lengths)
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    for further in ({}, {"num_beams": 3}):
        wanted = tuned.generate(input_ids=ids, use_cache=False, **settings, **further)
        assert torch.equal(tuned.generate(input_ids=ids, **settings, **further), wanted)
    if "full_attention" not in base.config.layer_types:  # whose places PEFT does not count its own tokens among
        found = tuned.generate(input_ids=ids, cache_implementation="static", **settings)
        assert torch.equal(found, tuned.generate(input_ids=ids, **settings))
    # padding lies between the virtual tokens and the prompt
    with torch.no_grad():
        together = tuned(input_ids=ids, attention_mask=mask).logits
        for row, n in enumerate(lengths):
            alone = tuned(input_ids=ids[row : row + 1, -n:]).logits[0, -n:]
            torch.testing.assert_close(together[row, -n:], alone, rtol=1e-4, atol=1e-4)
    # CPT wants labels of its own
    if not isinstance(config, CPTConfig):
        tuned.train()
        tuned(input_ids=ids, attention_mask=mask, labels=torch.where(mask.bool(), ids, -100)).loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in tuned.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", KINDS)
def test_prefix_tuning_is_refused_for_what_it_does(name):
    _, base = both(name, torch.float32)
    tuned = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL))
    with refuses("mismatch", "layer 0"):
        tuned(input_ids=tokens(2, 5))
    with refuses("mismatch", "layer 0"):
        tuned(input_ids=tokens(1, 4), attention_mask=torch.ones(1, 4, dtype=torch.long))
    with refuses("mismatch", "layer 0", "LoRA"):
        tuned.generate(input_ids=tokens(2, 5), max_new_tokens=2)
