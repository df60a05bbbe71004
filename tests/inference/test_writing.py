# pyright: reportArgumentType=false

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hgrn2.data import ByteTokenizer, train_bpe
from hgrn2.inference.writing import Sampling, Writer, sample
from hgrn2.models import HGRN2LM, HGRN2Config
from tests.refusals import refuses

BYTES = ByteTokenizer()


def make_model(vocab_size=257, seed=0, **changes):
    torch.manual_seed(seed)
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "expand_ratio": 8, "intermediate_size": 24}
    model = HGRN2LM(HGRN2Config.from_dict({"vocab_size": vocab_size, "initializer_range": 0.5} | settings | changes))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def writer(model, tokenizer=BYTES, **settings):
    return Writer(model, tokenizer, Sampling(**settings))


class Scripted:
    """A model that writes given tokens, whatever it reads."""

    def __init__(self, script, vocab_size=257):
        self.script, self.config = script, HGRN2Config(vocab_size=vocab_size, hidden_size=8, expand_ratio=8)
        self.read = []
        self.lm_head = self.head
        self.head.__func__.weight = torch.zeros(1)

    def init_state(self, batch_size):
        return None

    def hidden_states(self, ids, state):
        self.read += ids[0].tolist()
        return ids.unsqueeze(-1).float(), state

    def head(self, x):
        logits = torch.zeros(1, self.config.vocab_size)
        token = self.script.pop(0) if self.script else 46
        logits[0, token] = 100.0
        return logits


def write_scripted(script, max_tokens=100, stop=(), tokenizer=BYTES, vocab_size=257):
    model = Scripted(list(script), vocab_size)
    pieces = list(writer(model, tokenizer, temperature=0).write("", max_tokens, stop))
    return pieces, model


# drawing a token


def distribution(logits, seen=None, **settings):
    """The exact distribution that `sample` draws from, by listening to its draw."""
    drawn = []
    original = torch.multinomial

    def listen(p, *args, **kwargs):
        drawn.append(p.clone())
        return original(p, *args, **kwargs)

    torch.multinomial = listen
    try:
        sample(torch.tensor([logits]), Sampling(**settings), seen, torch.Generator().manual_seed(0))
    finally:
        torch.multinomial = original
    return drawn[0][0].tolist()


P = [0.5, 0.25, 0.15, 0.1]
LOGITS = [math.log(p) for p in P]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, P),
        ({"temperature": 0.5}, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 4}, P),
        ({"top_k": 100}, P),
        ({"temperature": 1e-300}, [1, 0, 0, 0]),
        ({"top_p": 0.4}, [1, 0, 0, 0]),
        ({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.8}, [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"top_p": 1e-300}, [1, 0, 0, 0]),
        ({"min_p": 0.25}, [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 3, "min_p": 0.4}, [2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_filters_by_hand(settings, wanted):
    settings = {"temperature": 1.0} | settings
    assert distribution(LOGITS, **settings) == pytest.approx(wanted, abs=1e-6)
    # the order of the tokens does not matter
    assert distribution(LOGITS[::-1], **settings) == pytest.approx(wanted[::-1], abs=1e-6)


def test_repetition_penalty_by_hand():
    seen = torch.tensor([[True, False, True]])
    found = distribution([2.0, 1.0, -1.0], seen, temperature=1.0, repetition_penalty=2.0)
    powers = [math.exp(1.0), math.exp(1.0), math.exp(-2.0)]
    assert found == pytest.approx([x / sum(powers) for x in powers], abs=1e-6)
    greedy = sample(torch.tensor([[2.0, 1.5, -1.0]]), Sampling(2.0, temperature=0), seen, None)
    assert greedy.tolist() == [1]


def test_no_more_than_top_k_of_equal_logits():
    assert sorted(distribution([1.0] * 5, temperature=1.0, top_k=2)) == [0, 0, 0, 0.5, 0.5]


def test_rows_are_drawn_apart():
    logits = torch.tensor([LOGITS, LOGITS[::-1]])
    assert sample(logits, Sampling(temperature=0), None, None).tolist() == [0, 3]
    drawn = torch.stack([
        sample(logits, Sampling(temperature=1.0, top_k=2), None, torch.Generator().manual_seed(i)) for i in range(600)
    ])  # fmt: skip
    assert set(drawn[:, 0].tolist()) == {0, 1}
    assert set(drawn[:, 1].tolist()) == {2, 3}
    assert (drawn[:, 0] == 0).float().mean().item() == pytest.approx(2 / 3, abs=0.08)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1},
     {"min_p": 2}, {"repetition_penalty": 0}, {"repetition_penalty": 1e-308}, {"repetition_penalty": 1e308},
     {"temperature": math.inf}, {"seed": 2**64}, {"seed": -(2**64)}],
)  # fmt: skip
def test_settings_that_cannot_be(settings):
    with refuses("invalid-value", "sampling", next(iter(settings))):
        Sampling(**settings)


# writing


def test_greedy_is_the_likeliest_token_step_by_step(model):
    found = writer(model, temperature=0)
    text = "".join(found.write("ab", 12))
    ids = [256, 97, 98]
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    assert 256 not in ids[3:], "the test's model should not end the text"
    assert text == BYTES.decode(ids[3:])


def test_seeds(model):
    texts = ["".join(writer(model, temperature=1.0, seed=seed).write("a", 30)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    fresh = {"".join(writer(model, temperature=1.0).write("a", 30)) for _ in range(3)}
    assert len(fresh) == 3


@pytest.mark.parametrize("prefill", [1, 3, 2048])
def test_long_prompts_are_read_in_parts(model, prefill, monkeypatch):
    monkeypatch.setattr("hgrn2.serve.reading.PREFILL_TOKENS", prefill)
    prompt = "a longer prompt " * 3
    found = writer(model, temperature=0)
    list(found.write(prompt, 1))
    ids = [256, *BYTES.encode(prompt)]
    with torch.no_grad():
        logits, state = model(torch.tensor([ids]))
    assert found.pending == [int(logits[0, -1].argmax())]
    for name, x in state.tensors().items():
        torch.testing.assert_close(found.state.tensors()[name], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_tokens", [0, 1, 7])
def test_no_more_than_max_tokens(max_tokens):
    pieces, model = write_scripted([65] * 50, max_tokens)
    assert "".join(pieces) == "A" * max_tokens
    # the last token is not read before it is needed
    assert model.read == ([256, *[65] * (max_tokens - 1)] if max_tokens else [])


def test_the_end_of_text_ends():
    pieces, model = write_scripted([65, 66, 256, 67])
    assert "".join(pieces) == "AB"
    assert model.script == [67]


def test_stop_texts_are_never_shown():
    text = "first line\nsecond STOP third"
    for stop, wanted in [
        (("STOP",), "first line\nsecond "),
        (("\n",), "first line"),
        (("nothing", "line\nsec"), "first "),
        (("STOP", "ond STOP"), "first line\nsec"),
        (("ond STOP th", "STOP"), "first line\nsecond "),
        (("f",), ""),
        (("STOPS",), text),
        (("third",), "first line\nsecond STOP "),
    ]:
        pieces, _ = write_scripted([*text.encode(), 256], stop=stop)
        assert "".join(pieces) == wanted, stop
        for n in range(1, len(pieces) + 1):
            assert wanted.startswith("".join(pieces[:n]))


def test_without_stop_texts_nothing_is_held_back():
    pieces, _ = write_scripted([*b"abc", 256])
    assert pieces == ["a", "b", "c"]
    with refuses("invalid-value", "stop"):
        write_scripted([*b"abc"], stop=("",))


def test_characters_of_several_bytes_stay_whole():
    pieces, _ = write_scripted([*"a é漢🙂b".encode(), 256])
    assert pieces == ["a", " ", "é", "漢", "🙂", "b"]
    pieces, _ = write_scripted([*"a é漢🙂b".encode(), 256], stop=("漢",))
    assert "".join(pieces) == "a é"
    pieces, _ = write_scripted([*"é漢".encode()[:-1], 256])
    assert "".join(pieces) == "é\ufffd"
    pieces, _ = write_scripted("x漢".encode(), max_tokens=2)
    assert "".join(pieces) == "x\ufffd"


def test_stop_texts_across_tokens_of_several_characters():
    tokenizer = train_bpe(["hello world, hello there world " * 50], 300)
    ids = tokenizer.encode("hello world, hello there")
    assert len(ids) < 12
    for stop, wanted in [("lo w", "hel"), ("ld, hel", "hello wor"), ("there", "hello world, hello ")]:
        pieces, _ = write_scripted([*ids, tokenizer.eot_id], stop=(stop,), tokenizer=tokenizer, vocab_size=300)
        assert "".join(pieces) == wanted


def test_tokens_the_tokenizer_does_not_know_are_not_written():
    model = make_model(vocab_size=512)
    with torch.no_grad():
        # the likeliest token everywhere is one of the padding
        model.lm_head.weight[300:] *= 100
    for temperature in (0, 1.0):
        found = writer(model, temperature=temperature, seed=0)
        text = "".join(found.write("abc", 40))
        assert text
        assert found.pending[0] < 257
    assert found.seen.shape == (1, 257)


def test_a_broken_model_is_named():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with refuses("not-finite", "generate"):
        list(writer(model).write("a", 5))


# states


@pytest.mark.parametrize("changes", [{}, {"use_short_conv": True}, {"attn": {"layers": [1], "num_heads": 2}}])
@pytest.mark.parametrize("cut", [1, 5, 19])
def test_going_on_from_a_file_is_going_on(tmp_path, cut, changes):
    model = make_model(**changes)
    settings = {"temperature": 0, "repetition_penalty": 1.3}
    whole = [256, *BYTES.encode("start ")]
    uninterrupted = written(writer(model, **settings), "start ", 20)
    first = writer(model, **settings)
    head = written(first, "start ", cut)
    first.save_state(tmp_path / "state")
    second = writer(model, **settings)
    second.load_state(tmp_path / "state")
    assert head + written(second, "", 20 - cut) == uninterrupted
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]
    # the state is that of everything read
    third = writer(model, **settings)
    third.load_state(tmp_path / "state")
    with torch.no_grad():
        _, wanted = model(torch.tensor([whole + head[:-1]]))
    for name, x in wanted.tensors().items():
        torch.testing.assert_close(third.state.tensors()[name], x, rtol=1e-4, atol=1e-5)


def written(writing, prompt, max_tokens):
    """Token ids, for text alone would hide bytes that are no characters."""
    ids = []
    original = writing._read

    def listen():
        ids.extend(writing.pending)
        return original()

    writing._read = listen
    before = len(writing.pending) + len(writing.tokenizer.encode(prompt))
    list(writing.write(prompt, max_tokens))
    return [*ids[before:], *writing.pending]


def test_one_writer_goes_on_with_its_draws(model):
    one, two = (writer(model, temperature=1.0, seed=3) for _ in range(2))
    assert written(one, "x", 9) + written(one, "", 11) == written(two, "x", 20)


def test_a_prompt_after_a_state(model, tmp_path):
    first = writer(model, temperature=0)
    head = written(first, "one ", 4)
    first.save_state(tmp_path / "state")
    second = writer(model, temperature=0)
    second.load_state(tmp_path / "state")
    tail = written(second, " two", 4)
    with torch.no_grad():
        ids = [256, *b"one ", *head, *b" two"]
        for token in tail:
            assert token == int(model(torch.tensor([ids]))[0][0, -1].argmax())
            ids.append(token)


def test_after_a_stop_text_the_state_has_it():
    pieces, model = write_scripted(b"ab;cd", stop=(";",))
    assert pieces == ["a", "b", ""] or "".join(pieces) == "ab"
    assert model.read == [256, *b"ab"]


def test_states_that_do_not_fit(model, tmp_path):
    good = tmp_path / "good"
    writing = writer(model, temperature=0)
    list(writing.write("abc", 3))
    writing.save_state(good)
    data = good.read_bytes()

    def refused(path, code, *names, **changes):
        other = make_model(**changes)
        tokenizer = changes.pop("tokenizer", BYTES)
        with refuses(code, path, *names) as caught:
            writer(other, tokenizer).load_state(path)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "missing", "unreadable", "--state-out")
    for size in (0, 5, 100, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:size])
        refused(tmp_path / "cut", "unreadable")
    refused(tmp_path, "unreadable")
    refused(good, "mismatch", "model", hidden_size=32)
    refused(good, "mismatch", "model", num_hidden_layers=3)
    refused(good, "mismatch", "model", use_short_conv=True)
    # of the same sizes, but with other weights or another meaning
    refused(good, "mismatch", "model", seed=1)
    refused(good, "mismatch", "model", scale=2.0)
    tokenizer = train_bpe(["abc"], 257)
    with refuses("mismatch", good, "tokenizer"):
        writer(model, tokenizer).load_state(good)
    tensors = load_file(good)
    with safe_open(good, "pt") as file:
        about = json.loads(file.metadata()["hgrn2"])
    for name, changed, keys in [
        ("no-seen", {k: v for k, v in tensors.items() if k != "seen"}, about),
        ("small-seen", tensors | {"seen": torch.zeros(1, 3, dtype=torch.bool)}, about),
        ("odd-name", tensors | {"odd": torch.zeros(1)}, about),
        ("odd-layer", tensors | {"layers.x.recurrent": torch.zeros(1)}, about),
        ("no-pending", tensors, {k: v for k, v in about.items() if k != "pending"}),
        ("nothing-pending", tensors, about | {"pending": []}),
    ]:
        # from before there were checksums
        save_file(changed, tmp_path / name, {"hgrn2": json.dumps(keys | {"format": "hgrn2-state-2"})})
        refused(tmp_path / name, "damaged")
        save_file(changed, tmp_path / name, {"hgrn2": json.dumps(keys)})
        refused(tmp_path / name, "damaged", "checksum")
    for name, metadata in [("other-format", json.dumps({"format": "x"})), ("a-list", "[1]"), ("no-json", "{")]:
        save_file(tensors, tmp_path / name, {"hgrn2": metadata})
        refused(tmp_path / name, "unreadable" if name == "no-json" else "version", "--state-out")
    save_file(tensors, tmp_path / "plain")
    refused(tmp_path / "plain", "version")


def test_a_state_that_cannot_be_written_leaves_nothing(model, tmp_path):
    writing = writer(model, temperature=0)
    list(writing.write("abc", 1))
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "none" / "state", type(tmp_path)(".")):
        with refuses("unwritable", path):
            writing.save_state(path)
    assert [p.name for p in tmp_path.rglob("*")] == ["folder"]
