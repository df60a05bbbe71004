"""Many clients at once, with some that leave and some that send nonsense: every answer is right or properly refused."""

import asyncio
import importlib
import sys
from pathlib import Path

import pytest

from hgrn2.serve import Engine, EngineOptions, Request, RequestSampling
from hgrn2.serve.http.options import ServerOptions
from hgrn2.serve.text import TextEngine
from tests.serve.http_server import BYTES, OPTIONS, running, tiny_model


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    yield importlib.import_module("serve")
    sys.modules.pop("serve", None)


@pytest.mark.slow
def test_answers_under_load_are_those_of_the_engine_alone(bench):
    prompts = [*bench.make_prompts(6, 40), *(start + end for start in bench.make_prompts(2, 30) for end in "abc")]
    engine = TextEngine(Engine(tiny_model(), OPTIONS), BYTES)
    expected = {one: "".join(engine.stream(one, Request((), 24, RequestSampling(0)))) for one in prompts}
    assert len(set(expected.values())) > 6
    limits = ServerOptions(max_waiting=16, max_body_bytes=50_000)
    # with a prefix cache that has room for a few states
    options = EngineOptions(4, 3, prefill_tokens=16, vocab_size=BYTES.vocab_size, prefix_bytes=60_000)
    load = bench.Load(32, 1.5, 120, prompts, 24, leave=0.25, malformed=0.1, oversized=0.05, body_bytes=60_000)
    with running(options=limits, engine_options=options) as server:
        found = asyncio.run(bench.put_load(server.url, load))
        server.wait_until_idle()
        assert server.send("GET", "/health")[0] == 200
    assert not found.unexpected()
    assert not found.bad_errors
    assert len(found.texts) > 3
    assert found.wrong(expected.__getitem__) == 0
    assert found.num_left
    kinds = {kind for kind, _ in found.statuses}
    assert kinds == {"whole", "leave", "malformed", "oversized"}
    assert all(value == value for value in found.rows().values())


def test_wrong_answers_are_counted(bench):
    found = bench.Found(texts=[("a", "x"), ("b", "y")])
    found.statuses["whole", 500] += 1
    assert found.wrong({"a": "x", "b": "z"}.__getitem__) == 1
    assert found.unexpected() == {"whole 500": 1}
    assert [bench.percentile([4, 1, 3, 2], p) for p in (50, 90, 100)] == [2, 4, 4]
