"""Bad input is refused with the right status and an error object, and never with status 500."""

import asyncio
import json
import socket

import pytest

from hgrn2.serve import Engine, EngineOptions
from hgrn2.serve.http.errors import ApiError
from hgrn2.serve.http.options import ServerOptions
from hgrn2.serve.http.schema import CompletionBody, parse_body
from hgrn2.serve.http.server import CompletionServer
from hgrn2.serve.text import TextEngine
from tests.models.cases import config_of, make_model
from tests.serve.http_server import EndlessTokenizer, assert_error, running, tiny_model

BODY = {"model": "hgrn2", "prompt": "Hi", "max_tokens": 3}
CHAT = {"model": "hgrn2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
LIMITS = ServerOptions(max_body_bytes=20_000, max_prompt_tokens=200, max_tokens=100, max_choices=8)


@pytest.fixture(scope="module")
def server():
    with running(options=LIMITS) as found:
        yield found


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1}, {"temperature": 1e9}, {"temperature": "0"}, {"temperature": [1]}, {"top_p": 0},
        {"top_p": 1.1}, {"n": 0}, {"n": -3}, {"n": 10**9}, {"n": 10**400}, {"n": True}, {"max_tokens": 0},
        {"max_tokens": -1}, {"max_tokens": 101}, {"max_tokens": 10**30}, {"max_tokens": 1.5}, {"seed": 2**64},
        {"seed": -(2**64)}, {"presence_penalty": 3}, {"frequency_penalty": -3}, {"logprobs": -1}, {"logprobs": 1000},
        {"logit_bias": {"1": 101}}, {"logit_bias": {"x": 1}}, {"logit_bias": {"٣": 1}}, {"logit_bias": {"257": 1}},
        {"logit_bias": {"-1": 1}}, {"logit_bias": [1]}, {"stop": ""}, {"stop": ["a", ""]}, {"stop": 3},
        {"stop": ["a"] * 17}, {"stop": "a" * 1025}, {"prompt": ""}, {"prompt": []}, {"prompt": None},
        {"prompt": [[]]}, {"prompt": ["a", ""]}, {"prompt": [257]}, {"prompt": [-1]}, {"prompt": [2**70]},
        {"prompt": [1.0]}, {"prompt": [True]}, {"prompt": {"a": 1}}, {"prompt": "a" * 300}, {"prompt": [1] * 300},
        {"prompt": ["a"] * 9}, {"best_of": 3}, {"echo": True}, {"suffix": "x"}, {"tools": []}, {"top_k": -1},
        {"min_p": 2}, {"repetition_penalty": 0}, {"stop_token_ids": [257]}, {"stream": 1}, {"stream_options": 3},
        {"session": 3}, {"temprature": 1},
    ],
    ids=lambda change: json.dumps(change)[:40],
)  # fmt: skip
def test_bad_values_are_refused(server, change):
    (name,) = change
    assert_error(*server.post("/v1/completions", BODY | change), 400, name)


@pytest.mark.parametrize("change", [{"echo": True}, {"suffix": "x"}], ids=json.dumps)
def test_unsupported_parameters_are_named_as_such(server, change):
    (name,) = change
    assert_error(*server.post("/v1/completions", BODY | change), 400, name, "unsupported")


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []}, {"messages": "Hi"}, {"messages": [{}]}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "x", "content": "a"}]}, {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, {"top_logprobs": 21},
        {"tools": [{}]}, {"response_format": {"type": "json_object"}}, {"max_completion_tokens": 0}, {"session": "x"},
    ],
    ids=lambda change: json.dumps(change)[:60],
)  # fmt: skip
def test_bad_chats_are_refused(server, change):
    (name,) = change
    assert_error(*server.post("/v1/chat/completions", CHAT | change), 400, name)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"nonsense", b"[]", b"null", b"3", b'{"prompt": "\xff\xfe"}', b'{"prompt": "\\ud800"}',
        b'{"temperature": NaN, "prompt": "a"}', b'{"temperature": Infinity, "prompt": "a"}', b"[" * 5000,
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"n": ' + b"9" * 5000 + b', "prompt": "a"}',
        b'{"prompt": "a"', b'{"prompt": "a"} x', "{\"prompt\": \"a\"}".encode("utf-16"),
    ],
    ids=lambda data: repr(data[:30]),
)  # fmt: skip
def test_bodies_that_are_not_json_objects_are_refused(server, data):
    assert_error(*server.post("/v1/completions", data), 400)
    assert_error(*server.post("/v1/chat/completions", data), 400)


def test_statuses_of_other_mistakes(server):
    assert_error(*server.post("/v1/completions", BODY | {"model": "other"}), 404, "other")
    assert_error(*server.post("/v1/nothing", BODY), 404)
    status, headers, body = server.send("GET", "/v1/completions")
    assert_error(status, body, 405)
    assert headers["allow"] == "POST"
    assert_error(*server.post("/v1/completions", BODY | {"prompt": "a" * 30_000}), 413, "20,000")
    assert_error(*server.post("/v1/completions", BODY | {"session": "session-" + "0" * 32}), 404)
    assert_error(*server.post("/v1/completions", BODY | {"session": "../../etc/passwd"}), 404)
    assert_error(*server.post("/v1/completions/cmpl-0/pause"), 404)
    status, _, body = server.send("DELETE", "/v1/sessions/session-" + "0" * 32)
    assert_error(status, body, 404)
    assert server.post("/v1/completions", BODY)[0] == 200


def test_a_body_longer_than_it_says_is_refused(server):
    with socket.create_connection(("127.0.0.1", server.port)) as link:
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        link.sendall(head.encode() + b"2710\r\n" + b"a" * 10_000 + b"\r\n")
        for _ in range(4):
            link.sendall(b"4e20\r\n" + b"a" * 20_000 + b"\r\n")
        assert link.recv(4096).startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", server.port)) as link:
        link.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert link.recv(4096).startswith(b"HTTP/1.1 400")


def test_pages_of_other_origins_are_refused(server):
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}):
        assert_error(*server.post("/v1/completions", BODY, headers), 403)
    own = {"Origin": server.url}
    assert server.post("/v1/completions", BODY, own)[0] == 200
    assert "access-control-allow-origin" not in server.send("POST", "/v1/completions", BODY, own)[1]


def test_an_allowed_origin_may_ask():
    with running(options=ServerOptions(cors_origins=("http://good.example",))) as server:
        good = {"Origin": "http://good.example"}
        status, headers, _ = server.send("POST", "/v1/completions", BODY, good)
        assert (status, headers["access-control-allow-origin"]) == (200, "http://good.example")
        asked = {**good, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        assert server.send("OPTIONS", "/v1/completions", headers=asked)[0] == 200
        assert_error(*server.post("/v1/completions", BODY, {"Origin": "http://evil.example"}), 403)


def test_a_key_is_asked_for():
    with running(options=ServerOptions(api_keys=("one", "two"))) as server:
        for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "one"}, {"Authorization": "Bearer"}):
            status, found, body = server.send("POST", "/v1/completions", BODY, headers)
            assert_error(status, body, 401)
            assert found["www-authenticate"] == "Bearer"
            assert server.send("GET", "/metrics", headers=headers)[0] == 401
        for key in ("one", "two"):
            assert server.post("/v1/completions", BODY, {"Authorization": f"Bearer {key}"})[0] == 200
        assert server.send("GET", "/health")[0] == 200


def test_a_full_queue_refuses_and_says_when_to_come_back():
    with running(tokenizer=EndlessTokenizer(), options=ServerOptions(max_waiting=2)) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as link:
            data = json.dumps(BODY | {"max_tokens": 4000, "n": 6, "stream": True}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
            link.sendall(head.encode() + data)
            assert link.recv(100).startswith(b"HTTP/1.1 200")
            status, headers, body = server.send("POST", "/v1/completions", BODY)
            assert_error(status, body, 429)
            assert 1 <= int(headers["retry-after"]) <= 60
        server.wait_until_idle()
        assert server.post("/v1/completions", BODY)[0] == 200


def test_the_limit_of_time_ends_an_answer():
    with running(tokenizer=EndlessTokenizer(), options=ServerOptions(max_seconds=0.3)) as server:
        status, body = server.post("/v1/completions", BODY | {"max_tokens": 4000})
        assert status == 200
        assert body["choices"][0]["finish_reason"] == "length"
        assert 0 < body["usage"]["completion_tokens"] < 4000


def test_a_body_that_does_not_arrive_is_refused():
    with (
        running(options=ServerOptions(body_seconds=0.2)) as server,
        socket.create_connection(("127.0.0.1", server.port)) as link,
    ):
        link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        link.settimeout(20)
        assert link.recv(100).startswith(b"HTTP/1.1 408")


def test_a_model_without_a_tokenizer_takes_and_gives_tokens():
    with running(tiny_model(), None, engine_options=EngineOptions(4)) as server:
        assert_error(*server.post("/v1/completions", BODY), 400, "tokenizer")
        assert_error(*server.post("/v1/chat/completions", CHAT), 400, "tokenizer")
        assert_error(*server.post("/v1/completions", BODY | {"prompt": [1], "stop": "a"}), 400, "stop")
        status, body = server.post("/v1/completions", BODY | {"prompt": [1, 2], "logprobs": 1})
        assert status == 200
        (choice,) = body["choices"]
        assert choice["text"] == ""
        assert len(choice["token_ids"]) == 3
        assert choice["logprobs"]["tokens"] == [str(token) for token in choice["token_ids"]]


def test_a_text_too_long_for_full_attention_is_refused():
    model = make_model(config_of("full-attention"))
    with running(model, None, engine_options=EngineOptions(2, context_limit=32)) as server:
        assert_error(*server.post("/v1/completions", {"prompt": [1] * 20, "max_tokens": 13}), 400, "context_limit")
        assert server.post("/v1/completions", {"prompt": [1] * 20, "max_tokens": 12})[0] == 200


def test_a_model_whose_outputs_are_not_finite_says_so():
    model = tiny_model()
    model.lm_head.weight.data.fill_(float("nan"))
    with running(model) as server:
        assert_error(*server.post("/v1/completions", BODY), 500, "finite")
        assert server.send("GET", "/health")[0] == 200


def test_a_client_that_reads_nothing_keeps_no_others_out():
    engine = TextEngine(Engine(tiny_model(), EngineOptions(1, vocab_size=257)), EndlessTokenizer())
    server = CompletionServer(engine, ServerOptions(max_waiting=0, max_seconds=0.2))
    server.thread.start()

    async def talk():
        body = parse_body(CompletionBody, json.dumps(BODY | {"max_tokens": 4000}).encode())
        chunks = server.chunks(await server.start_completion(body))
        await anext(chunks)
        with pytest.raises(ApiError) as caught:
            await server.start_completion(body)
        assert caught.value.status == 429
        # it leaves the stream as it is
        await asyncio.sleep(0.3)
        other = await server.start_completion(body)
        rest = [chunk async for chunk in chunks]
        assert rest[-1] == b"data: [DONE]\n\n"
        assert b'"finish_reason": "length"' in rest[-2]
        server.end(other)

    asyncio.run(talk())
    server.thread.close()
    assert engine.engine.num_free_rows == engine.engine.pool.num_rows


def test_a_draining_server_takes_no_new_work():
    with running() as server:
        server.server.completions.is_draining = True
        status, headers, body = server.send("POST", "/v1/completions", BODY)
        assert_error(status, body, 503)
        assert int(headers["retry-after"]) > 0
        assert server.send("GET", "/health")[0] == 503
        assert server.send("GET", "/v1/models")[0] == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_fails_the_requests_and_the_health():
    class Broken(TextEngine):
        def step(self):
            raise MemoryError("no memory left")

    engine = Broken(Engine(tiny_model(), EngineOptions(1, vocab_size=257)), EndlessTokenizer())
    server = CompletionServer(engine, ServerOptions())
    server.thread.start()

    async def talk():
        body = parse_body(CompletionBody, json.dumps(BODY).encode())
        with pytest.raises(MemoryError):
            await server.answer(await server.start_completion(body))
        with pytest.raises(ApiError) as caught:
            await server.start_completion(body)
        assert caught.value.status == 503

    asyncio.run(talk())
    server.thread.close()
    assert not server.thread.is_alive
