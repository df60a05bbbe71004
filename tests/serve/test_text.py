"""Text out of the engine: whole characters, and stop texts wherever the bounds of tokens lie."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hgrn2.data import ByteTokenizer
from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.serve import Engine, EngineOptions, Request, RequestSampling
from hgrn2.serve.text import StoppableText, TextEngine
from tests.refusals import refuses

BYTES = ByteTokenizer()


def written(data, stop):
    text = StoppableText(BYTES, (), stop)
    pieces = [text.push(token) for token in data]
    return "".join(pieces) + text.flush(), text.is_stopped, pieces


@settings(max_examples=60)
@given(st.text("abé", max_size=12), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_text(text, stop):
    # the first token at whose end a stop text is there decides, as a reader of single tokens would
    found, is_stopped, _ = written(text.encode(), stop)
    ends = [i for i in range(len(text) + 1) if any(s in text[:i] for s in stop)]
    assert is_stopped == bool(ends)
    seen = text[: ends[0]] if ends else text
    cut = min((seen.find(s) for s in stop if s in seen), default=len(seen))
    assert found == seen[:cut]


def test_nothing_is_held_back_without_need():
    assert written(b"abc", [])[2] == ["a", "b", "c"]
    # one character may begin a stop text of two
    assert written(b"abc", ["xy"])[2] == ["", "a", "b"]
    assert written("é".encode(), [])[2] == ["", "é"]
    assert written(b"a\xc3", [])[0] == "a�"
    with refuses("invalid-value"):
        StoppableText(BYTES, (), [""])


def model(seed=0):
    import torch

    torch.manual_seed(seed)
    config = HGRN2Config(
        vocab_size=BYTES.vocab_size + 3, hidden_size=16, num_hidden_layers=2, expand_ratio=8, intermediate_size=24,
        initializer_range=0.5,
    )  # fmt: skip
    return HGRN2LM(config).eval()


OPTIONS = EngineOptions(4, vocab_size=BYTES.vocab_size)
SAMPLING = RequestSampling(0.7, seed=5)


def test_texts_with_several_continuations_stop_each_on_its_own():
    engine = TextEngine(Engine(model(), OPTIONS), BYTES)
    request = Request((), 60, SAMPLING, n=3)

    def run(stop):
        number = engine.submit("Hi", request, stop)
        texts, reasons = [""] * 3, [None] * 3
        while engine.engine.is_busy:
            for event in engine.step():
                assert event.token.request_id == number
                assert reasons[event.token.index] is None
                texts[event.token.index] += event.text
                reasons[event.token.index] = event.finish_reason
        return texts, reasons

    whole, reasons = run(())
    assert set(reasons) <= {"length", "stop"}
    stop = next(whole[0][i : i + 2] for i in range(5, len(whole[0])) if whole[0][i : i + 2].isascii())
    cut, reasons = run([stop])
    assert reasons[0] == "stop"
    for one, two in zip(whole, cut, strict=True):
        assert two == one.partition(stop)[0]
    assert engine.engine.num_free_rows == engine.engine.pool.num_rows


def test_a_stream_that_is_closed_frees_its_row():
    engine = TextEngine(Engine(model(), OPTIONS), BYTES)
    whole = "".join(engine.stream("Hi", Request((), 20, SAMPLING)))
    stream = engine.stream("Hi", Request((), 20, SAMPLING))
    assert whole.startswith(next(stream))
    stream.close()
    assert engine.engine.num_free_rows == engine.engine.pool.num_rows


def test_a_session_takes_more_text():
    engine = TextEngine(Engine(model(), OPTIONS), BYTES)
    number = engine.submit("Hi", Request((), 9, RequestSampling(0), keep=True))
    while engine.engine.is_busy:
        engine.step()
    session = engine.engine.session(number)
    more = "".join(engine.stream(" and", Request((), 5, RequestSampling(0)), session=session))
    prompt = [*session.tokens, *BYTES.encode(" and")]
    (found,) = engine.engine.generate([Request(prompt, 5, RequestSampling(0), stop_ids=BYTES.end_ids)])
    assert more == BYTES.decode([token for token in found.tokens if token not in BYTES.end_ids])


def test_ids_beyond_the_tokenizer_are_never_drawn():
    with refuses("mismatch", 257, 260):
        TextEngine(Engine(model()), BYTES)
    with refuses("mismatch", 999):
        Engine(model(), EngineOptions(vocab_size=999))
    lm = model()
    lm.lm_head.weight.data[BYTES.vocab_size :] *= 100
    (found,) = Engine(lm, OPTIONS).generate([Request([1], 50, RequestSampling(3.0))])
    assert max(found.tokens) < BYTES.vocab_size


@pytest.mark.parametrize("prompt", [""])
def test_an_empty_prompt_needs_a_start_token(prompt):
    engine = TextEngine(Engine(model(), OPTIONS), BYTES)
    if BYTES.start_ids:
        assert engine.submit(prompt) == 0
    else:
        with refuses("invalid-value", "tokens"):
            engine.submit(prompt)
