"""Opening, saving and running a model in a line each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hgrn2
from hgrn2 import HGRN2LM, Sampling, presets
from hgrn2.data import load_tokenizer
from hgrn2.inference.writing import Writer
from tests.models.cases import config_of, make_model, tokens
from tests.refusals import refuses

SIZE = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "expand_ratio": 8, "intermediate_size": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    assert HGRN2LM(presets.tiny(**SIZE)).save(place, load_tokenizer("bytes")) == place
    return place


def test_a_model_is_opened_from_a_string_with_its_tokenizer(folder):
    loaded = hgrn2.load(str(folder), device="cpu")
    model, tokenizer = loaded
    assert not model.training
    assert model.lm_head.weight.dtype == torch.float32
    assert model.config == presets.tiny(**SIZE)
    assert tokenizer.decode(tokenizer.encode("a text")) == "a text"
    sampling = Sampling(seed=3)
    assert loaded.write("a", 9, sampling) == "".join(Writer(model, tokenizer, sampling).write("a", 9))


@pytest.mark.parametrize("name", ["fla", "official-lra", "tied", "window-attention"])
def test_what_is_saved_is_what_is_opened(name, tmp_path):
    model = make_model(config_of(name), torch.float32)
    again = HGRN2LM.load(str(model.save(str(tmp_path / "out"))), device="cpu")
    assert again.config == model.config
    for (key, one), (_, two) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, two), key
    assert (again.lm_head.weight is again.model.embeddings.weight) == model.config.tie_word_embeddings
    low = HGRN2LM.load(model.bfloat16().save(tmp_path / "low"), device="cpu")
    assert torch.equal(low.lm_head.weight, model.lm_head.weight.float())


def test_what_cannot_be_opened_or_saved_is_refused_in_one_line(folder, tmp_path):
    model = HGRN2LM.load(folder, device="cpu")
    for call, code, names in [
        (lambda: model.save(folder), "already-exists", [folder]),
        (lambda: model.save(3), "invalid-value", ["folder is 3"]),
        (lambda: model.save(tmp_path / "x", load_tokenizer("bytes")), None, []),
        (
            lambda: make_model(config_of("fla")).save(tmp_path / "y", load_tokenizer("bytes")),
            "mismatch",
            ["'bytes'", 257, 29],
        ),
        (lambda: HGRN2LM.load("no/such"), "not-found", ["no/such"]),
        (lambda: HGRN2LM.load(""), "invalid-value", ["path is ''"]),
        (lambda: HGRN2LM.load(model), "invalid-value", ["path", "HGRN2LM"]),
        (lambda: HGRN2LM.load(folder, "newest"), "invalid-value", ["checkpoint", "'newest'", "'latest'"]),
        (lambda: HGRN2LM.load(folder, device="gpu"), "unavailable", ["'gpu'"]),
    ]:
        if code is None:
            call()
            continue
        with refuses(code, *names) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "y").exists()


@pytest.mark.slow
def test_torch_alone_generates_and_says_what_opening_needs():
    code = """if True:
        import sys
        sys.modules |= dict.fromkeys(("numpy", "safetensors", "tokenizers", "rich", "tyro", "matplotlib", "triton"))
        import warnings
        warnings.simplefilter("ignore")
        import torch, hgrn2
        model = hgrn2.HGRN2LM(hgrn2.presets.tiny(vocab_size=17, hidden_size=64, num_hidden_layers=1))
        print(model.generate(torch.tensor([[1, 2]]), 3, hgrn2.Sampling(seed=0)).shape)
        for call in (lambda: model.load("x"), lambda: hgrn2.load("x"), lambda: model.save("x")):
            try:
                call()
            except ImportError as error:
                print(error)
    """
    env = {"PYTHONPATH": str(Path(hgrn2.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    shape, *lines = done.stdout.splitlines()
    assert shape == "torch.Size([1, 5])"
    assert [line.split(" needs ")[0] for line in lines] == ["HGRN2LM.load", "hgrn2.load", "HGRN2LM.save"]
    assert all("which is not installed: pip install" in line and "[train]" in line for line in lines)


# token ids


@torch.no_grad()
def likeliest(model: HGRN2LM, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Every token with the whole text read again."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[0][:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("name", ["fla", "short-conv", "window-attention"])
def test_generation_is_the_plain_loop(name, monkeypatch):
    model, ids = make_model(config_of(name)), tokens(2, 7)
    wanted = likeliest(model, ids, 6)
    assert torch.equal(model.generate(ids, 6, Sampling(temperature=0)), wanted)
    monkeypatch.setattr("hgrn2.models.generation.PREFILL_TOKENS", 3)
    assert torch.equal(model.generate(ids, 6, Sampling(temperature=0)), wanted)
    # a shorter prompt, padded on the left
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:1, :3]], 1)
    both = torch.cat([padded, ids[1:]])
    mask = torch.ones_like(both)
    mask[0, :4] = 0
    found = model.generate(both, 6, Sampling(temperature=0), attention_mask=mask)
    assert torch.equal(found[0, 7:], likeliest(model, ids[:1, :3], 6)[0, 3:])
    assert torch.equal(found[1], wanted[1])


def test_generation_draws_by_seed_and_leaves_the_model_as_it_was():
    model, ids = make_model(config_of("fla")).train(), tokens(3, 4)
    one, two, other = (model.generate(ids, 20, Sampling(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert model.training
    assert one.shape == (3, 24)
    assert torch.equal(model.generate(ids, 0), ids)


def test_a_text_ends_at_a_stop_id_and_repeats_it():
    model, ids = make_model(config_of("fla")), tokens(2, 5)
    plain = model.generate(ids, 12, Sampling(temperature=0))
    stop = int(plain[0, 7])
    found = model.generate(ids, 12, Sampling(temperature=0), stop_ids=[stop])
    for row, text in zip(found.tolist(), plain.tolist(), strict=True):
        written = text[5:]
        end = written.index(stop) + 1 if stop in written else len(written)
        kept = written[:end] + [stop] * (len(row) - 5 - end)
        assert row[5:] == kept[: len(row) - 5]
    alone = model.generate(ids[:1], 12, Sampling(temperature=0), stop_ids=[stop])
    assert alone.shape[1] <= 8
    assert int(alone[0, -1]) == stop


def test_padding_is_not_a_token_that_was_there():
    model = make_model(config_of("fla"))
    ids, mask = torch.tensor([[9, 3, 4]]), torch.tensor([[0, 1, 1]])
    sampling = Sampling(temperature=0, repetition_penalty=100.0)
    found = model.generate(ids, 3, sampling, attention_mask=mask)
    assert torch.equal(found[:, 1:], model.generate(ids[:, 1:], 3, sampling))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"input_ids": [1, 2]}, ["input_ids", "list", "[B, T]"]),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, ["input_ids"]),
        ({"max_tokens": -1}, ["max_tokens", -1]),
        ({"max_tokens": "9"}, ["max_tokens", "'9'"]),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, ["attention_mask"]),
        ({"attention_mask": torch.ones(1, 2)}, ["attention_mask", [1, 2], [1, 3]]),
    ],
)
def test_what_cannot_be_continued_is_refused(arguments, names):
    model = make_model(config_of("fla"))
    with refuses("invalid-value", *names):
        model.generate(**({"input_ids": torch.tensor([[1, 2, 3]])} | arguments))
    with refuses("invalid-value", "temperature", "'1'"):
        Sampling(temperature="1")  # type: ignore[arg-type]


def test_a_model_that_is_not_finite_is_refused():
    model = make_model(config_of("fla"))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with refuses("not-finite", "outputs"):
        model.generate(torch.tensor([[1]]), 2)
