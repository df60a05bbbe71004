"""One folder of `hgrn2 convert` for `hgrn2 generate` and for transformers."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hgrn2.cli import main
from hgrn2.data.prepare import prepare
from hgrn2.formats import run_folder
from hgrn2.formats.convert_model import convert_model
from hgrn2.hf import HGRN2ForCausalLM
from hgrn2.inference.writing import Sampling, Writer
from hgrn2.loading import load
from hgrn2.models import HGRN2Config
from hgrn2.train.runs import start_language_run

PROMPT = "document 3: é"


@pytest.fixture(scope="module", params=["bytes", "bpe:300"])
def folders(request, tmp_path_factory):
    """A run, and what `hgrn2 convert --to native` makes of it."""
    root = tmp_path_factory.mktemp("folders")
    (root / "texts").mkdir()
    for index in range(30):
        words = " ".join(f"é{index * k % 13}" for k in range(5 + index))
        (root / "texts" / f"{index:02}.txt").write_text(f"document {index}: {words}\n", encoding="utf-8")
    data = prepare([str(root / "texts")], request.param, root / "prepared", validation_fraction=0.3, progress=False)
    # a vocabulary larger than the tokenizer's, whose upper end is never written
    size = data.tokenizer.vocab_size + 7
    config = HGRN2Config(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, expand_ratio=8, intermediate_size=48,
        tie_word_embeddings=True,
    )  # fmt: skip
    settings = {
        "max_steps": 30,
        "batch_size": 4,
        "seq_len": 48,
        "learning_rate": 1e-2,
        "validation_tokens": 500,
        "device": "cpu",
    }
    start_language_run(root / "run", config, settings, data, data_settings={})
    convert_model(root / "run", root / "converted", "native", "same", "5GB", "latest")
    return root / "run", root / "converted"


def written(folder, prompt, count):
    """The greedy tokens of `hgrn2 generate`, those of the prompt and the token before it included."""
    own, tokenizer = load(folder, "latest", "cpu")
    writer = Writer(own, tokenizer, Sampling(temperature=0))
    ids = [*writer.pending, *tokenizer.encode(prompt)]
    for _ in writer.write(prompt, count):
        pass
    # step by step, for the writer gives text
    again = Writer(own, tokenizer, Sampling(temperature=0))
    again.pending += tokenizer.encode(prompt)
    for _ in range(count):
        token = int(again._read().argmax(-1))
        again.pending = [token]
        ids.append(token)
        if token == tokenizer.eot_id:
            break
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [PROMPT, "", "7", "a text\n\n of more ﬀ lines"])
def test_the_same_tokens(folders, prompt):
    run, converted = folders
    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted)
    inputs = tokenizer(prompt, return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist()
    assert found == written(converted, prompt, 24) == written(run, prompt, 24)
    if not prompt:
        # nothing at all is a text, too: it begins with its first token
        assert model.generate(max_new_tokens=24, do_sample=False)[0].tolist() == found


@pytest.mark.slow
def test_the_same_text_at_the_command_line(folders, capsys):
    _, converted = folders
    main(["generate", str(converted), "--prompt", PROMPT, "--temperature", "0", "--max-tokens", "24"])
    shown = capsys.readouterr().out
    write = pipeline("text-generation", model=str(converted))
    text = write(PROMPT, max_new_tokens=24, do_sample=False)[0]["generated_text"]
    assert shown.rstrip("\n") == text.rstrip("\n")


def test_texts_of_different_lengths(folders):
    _, converted = folders
    write = pipeline("text-generation", model=str(converted), batch_size=3)
    prompts = [PROMPT, "d", "document 11: é5 é0"]
    together = [x[0]["generated_text"] for x in write(prompts, max_new_tokens=12, do_sample=False)]
    alone = [write(x, max_new_tokens=12, do_sample=False)[0]["generated_text"] for x in prompts]
    assert together == alone


def test_its_settings(folders):
    _, converted = folders
    model = AutoModelForCausalLM.from_pretrained(converted)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    own = load(converted, "latest", "cpu")[1]
    ids = {own.eot_id}
    for settings in (model.config, model.generation_config, tokenizer):
        assert {settings.bos_token_id, settings.eos_token_id, settings.pad_token_id} == ids
    assert model.generation_config.suppress_tokens == list(range(own.vocab_size, own.vocab_size + 7))
    assert model.lm_head.weight is model.model.embeddings.weight
    text = "A text: x\n<|endoftext|>"
    plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert plain == own.encode(text)
    # here theirs differ: what reads like the end of a text is one
    assert tokenizer(text).input_ids == [own.eot_id, *own.encode("A text: x\n"), own.eot_id]


def test_older_folders_and_checkpoints_open_by_their_class(folders, tmp_path):
    run, converted = folders
    wanted = AutoModelForCausalLM.from_pretrained(converted).state_dict()
    config = json.loads((converted / "config.json").read_text())
    # as it was before transformers was thought of
    (tmp_path / "config.json").write_text(json.dumps({"data": {}, **{key: config[key] for key in ("model", "train")}}))
    (tmp_path / "model.safetensors").write_bytes((converted / "model.safetensors").read_bytes())
    for folder in (tmp_path, run_folder.checkpoints_of(run)[-1]):
        found = HGRN2ForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(found[name], x) for name, x in wanted.items())
        with pytest.raises(ValueError, match="model_type"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_what_transformers_saves_opens_with_our_command_line(folders, tmp_path):
    run, converted = folders
    AutoModelForCausalLM.from_pretrained(converted).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(converted).save_pretrained(tmp_path)
    assert written(tmp_path, PROMPT, 24) == written(run, PROMPT, 24)


def test_classification_pipeline(folders, tmp_path):
    _, converted = folders
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(converted, id2label={0: "prose", 1: "verse"})
    tokenizer = AutoTokenizer.from_pretrained(converted)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    texts = ["a", "document 5: é1 é2", ""]
    together = classify(texts, batch_size=3)
    for text, found in zip(texts, together, strict=True):
        with torch.no_grad():
            p = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        wanted = {"prose": p[0].item(), "verse": p[1].item()}
        assert {x["label"]: x["score"] for x in found} == pytest.approx(wanted, abs=1e-5)


def test_state_files_go_from_the_run_to_what_is_converted(folders, tmp_path, capsys):
    run, converted = folders
    flags, state = ["--temperature", "0", "--max-tokens", "8"], str(tmp_path / "state")
    main(["generate", str(run), "--prompt", PROMPT, *flags, "--state-out", state])
    capsys.readouterr()
    main(["generate", str(converted), *flags, "--state-in", state])
    own, tokenizer = load(run, "latest", "cpu")
    text = "".join(Writer(own, tokenizer, Sampling(temperature=0)).write(PROMPT, 16))
    shown = capsys.readouterr().out.rstrip("\n")
    assert shown
    assert text.rstrip("\n").endswith(shown)
