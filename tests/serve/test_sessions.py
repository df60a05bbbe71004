"""A text that pauses goes on exactly, from memory or from a file, here or elsewhere."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hgrn2.serve import Engine, EngineOptions, Request, RequestSampling, Session
from tests.models.cases import config_of, make_model, tokens
from tests.refusals import refuses

SAMPLING = RequestSampling(2.0, top_p=0.9, frequency_penalty=0.3, repetition_penalty=1.2, seed=11)
OPTIONS = EngineOptions(4, context_limit=64)


def drain(engine, number):
    found = []
    while engine.is_busy:
        found += [event.token for event in engine.step() if event.request_id == number and event.token is not None]
    return found


def paused(engine, ids, after, max_tokens=20):
    number = engine.submit(Request(ids, max_tokens, SAMPLING))
    written = []
    while len(written) < after:
        written += [event.token for event in engine.step()]
    return written, engine.pause(number)


@pytest.mark.parametrize("name", ["fla", "full-attention", "window-attention", "mamba", "short-conv"])
@pytest.mark.parametrize("after", [1, 7])
def test_a_session_goes_on_elsewhere_as_if_it_had_not_paused(tmp_path, name, after):
    ids = tokens(9).tolist()
    (wanted,) = Engine(make_model(config_of(name)), OPTIONS).generate([Request(ids, 20, SAMPLING)])
    engine = Engine(make_model(config_of(name)), OPTIONS)
    written, session = paused(engine, ids, after)
    assert engine.num_free_rows == engine.pool.num_rows
    session.save(tmp_path / "session.safetensors")
    other = Engine(make_model(config_of(name)), OPTIONS)
    # with other requests running beside it
    other.submit(Request([1, 2, 3], 30))
    other.step()
    rest = RequestSampling(2.0, top_p=0.9, frequency_penalty=0.3, repetition_penalty=1.2)
    for _ in range(2):
        session = Session.load(tmp_path / "session.safetensors")
        number = other.submit(Request((), 20 - len(written), rest), session)
        assert [*written, *drain(other, number)] == wanted.tokens


def test_a_session_left_by_a_request_takes_more_text():
    model = make_model(config_of("fla"))
    engine = Engine(model, OPTIONS)
    greedy = RequestSampling(0)
    number = engine.submit(Request(tokens(6).tolist(), 5, greedy, keep=True))
    written = drain(engine, number)
    session = engine.session(number)
    more = [3, 1, 4]
    number = engine.submit(Request(more, 5, greedy, return_logits=True), session)
    logits = []
    while engine.is_busy:
        logits += [event.logits for event in engine.step()]
    text = [*tokens(6).tolist(), *written, *more]
    torch.testing.assert_close(logits[0], model(torch.tensor([text]))[0][0, -1], rtol=1e-9, atol=1e-10)
    with refuses("not-found"):
        engine.session(number)


def edited(path, change):
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = json.loads(metadata["hgrn2"])
    change(about, found)
    metadata["hgrn2"] = json.dumps(about)
    save_file(found, path, metadata)


def test_files_that_changed_or_belong_elsewhere_are_refused(tmp_path):
    path = tmp_path / "session.safetensors"
    engine = Engine(make_model(config_of("fla")), OPTIONS)
    _, session = paused(engine, tokens(9).tolist(), 3)

    def one_value(about, found):
        found["layers.1.recurrent"][0, 0, 0, 0] += 1e-6

    for change in (one_value, lambda about, found: about["tokens"].append(3)):
        session.save(path)
        edited(path, change)
        with refuses("damaged", path):
            Session.load(path)
    session.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with refuses("unreadable", path):
        Session.load(path)
    with refuses("unreadable", "missing"):
        Session.load(tmp_path / "missing")
    # the same shapes with other weights, and another configuration
    for other in (make_model(config_of("fla"), seed=5), make_model(config_of("no-bound"))):
        with refuses("mismatch"):
            Engine(other, OPTIONS).submit(Request((), 3), session)
