"""States that clients keep: forked, rewound, paused to a file, resumed by another process, or refused whole."""

import json
import shutil
import threading

import pytest

from hgrn2.serve import EngineOptions
from hgrn2.serve.http.options import ServerOptions
from tests.serve.http_server import BYTES, EndlessTokenizer, assert_error, running, tiny_model

BODY = {"prompt": "Hi", "max_tokens": 12, "temperature": 0}


def text_of(answer):
    status, body = answer
    assert status == 200, body
    return body["choices"][0]["text"]


def test_a_kept_session_is_continued_forked_and_rewound():
    with running(tokenizer=EndlessTokenizer()) as server:
        ids = server.post("/v1/completions", BODY | {"max_tokens": 30, "return_token_ids": True})[1]["choices"][0]
        status, body = server.post("/v1/completions", BODY | {"keep": True, "return_token_ids": True})
        (choice,) = body["choices"]
        assert choice["token_ids"] == ids["token_ids"][:12]
        session = choice["session"]
        more = BODY | {"prompt": "", "session": session, "max_tokens": 18, "return_token_ids": True}
        for _ in range(2):
            status, body = server.post("/v1/completions", more)
            assert status == 200
            assert body["choices"][0]["token_ids"] == ids["token_ids"][12:]
            assert body["usage"]["prompt_tokens"] == 0
        # forks differ by their seeds
        forks = server.post("/v1/completions", more | {"temperature": 1, "seed": 3, "n": 4})[1]["choices"]
        assert len({fork["text"] for fork in forks}) == 4
        prompt = [*BYTES.start_ids, *b"Hi", *ids["token_ids"][:12], *b" and"]
        whole = text_of(server.post("/v1/completions", BODY | {"prompt": prompt}))
        assert text_of(server.post("/v1/completions", BODY | {"prompt": " and", "session": session})) == whole
        about = server.send("GET", f"/v1/sessions/{session}")[2]
        assert (about["num_tokens"], about["is_saved"]) == (15, False)
        assert about["bytes"] == server.send("GET", "/v1/models")[2]["data"][0]["state_bytes"]
        assert server.send("DELETE", f"/v1/sessions/{session}")[0] == 200
        assert_error(*server.post("/v1/completions", more), 404, session)


def test_a_session_ends_after_a_stop_text_too():
    with running(tokenizer=EndlessTokenizer()) as server:
        whole = text_of(server.post("/v1/completions", BODY | {"max_tokens": 40}))
        stop = next(whole[i : i + 2] for i in range(4, 38) if whole[i : i + 2].isascii())
        _, body = server.post("/v1/completions", BODY | {"max_tokens": 40, "stop": stop, "keep": True})
        (choice,) = body["choices"]
        assert choice["text"] == whole.partition(stop)[0]
        # the state has read the stop text
        rest = text_of(server.post("/v1/completions", BODY | {"prompt": "", "session": choice["session"]}))
        assert whole.startswith((choice["text"] + stop + rest)[:20])


def test_a_running_stream_is_paused_and_resumed():
    with running(tokenizer=EndlessTokenizer()) as server:
        body = BODY | {"max_tokens": 4000, "stream": True, "return_token_ids": True}
        events, paused = [], threading.Event()

        def read():
            import http.client

            link = http.client.HTTPConnection("127.0.0.1", server.port)
            link.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            for line in link.getresponse():
                if line.startswith(b"data: {"):
                    events.append(json.loads(line[6:]))
                    paused.set()
            link.close()

        reader = threading.Thread(target=read)
        reader.start()
        assert paused.wait(20)
        status, found = server.post(f"/v1/completions/{events[0]['id']}/pause")
        assert status == 200
        reader.join(20)
        (session,) = found["sessions"]
        tokens = [token for event in events for token in event["choices"][0]["token_ids"]]
        assert 0 < len(tokens) < 4000
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        settings = BODY | {"return_token_ids": True}
        whole = server.post("/v1/completions", settings | {"max_tokens": len(tokens) + 12})[1]["choices"][0]
        rest = server.post("/v1/completions", settings | {"prompt": "", "session": session})[1]["choices"][0]
        assert tokens + rest["token_ids"] == whole["token_ids"]


@pytest.mark.slow
def test_a_saved_session_outlives_the_server(tmp_path):
    options = ServerOptions(session_folder=tmp_path / "sessions")
    with running(tokenizer=EndlessTokenizer(), options=options) as server:
        session = server.post("/v1/completions", BODY | {"keep": True})[1]["choices"][0]["session"]
        more = BODY | {"prompt": "", "session": session}
        wanted = text_of(server.post("/v1/completions", more))
        status, found = server.post(f"/v1/sessions/{session}/save")
        assert (status, found["is_saved"]) == (200, True)
    path = options.session_folder / f"{session}.safetensors"
    assert path.stat().st_size == found["file_bytes"]
    # what a killed process leaves behind
    partial = options.session_folder / f".{path.name}.1-0.partial"
    partial.write_bytes(b"half")
    with running(tokenizer=EndlessTokenizer(), options=options) as server:
        assert not partial.exists()
        assert text_of(server.post("/v1/completions", more)) == wanted
        assert server.send("GET", f"/v1/sessions/{session}")[2]["is_saved"]
    with running(tiny_model(5), options=options) as server:
        assert_error(*server.post("/v1/completions", more), 400, "mismatch")
        # the other model's file stays
        assert path.exists()
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-9] + b"\x07" + whole[-8:], b""):
        path.write_bytes(damaged)
        with running(tokenizer=EndlessTokenizer(), options=options) as server:
            assert_error(*server.post("/v1/completions", more), 400, session)
            assert not path.exists()
            assert_error(*server.post("/v1/completions", more), 404)


def test_sessions_beyond_the_memory_leave_and_saved_ones_come_back(tmp_path):
    options = ServerOptions(session_folder=tmp_path, session_bytes=3 * 2048)
    with running(tokenizer=EndlessTokenizer(), options=options) as server:
        keep = BODY | {"keep": True}
        names = [choice["session"] for choice in server.post("/v1/completions", keep | {"n": 3})[1]["choices"]]
        assert server.post(f"/v1/sessions/{names[1]}/save")[0] == 200
        wanted = text_of(server.post("/v1/completions", BODY | {"prompt": "", "session": names[1]}))
        assert server.post("/v1/completions", keep | {"n": 3})[0] == 200
        assert_error(*server.post("/v1/completions", BODY | {"prompt": "", "session": names[0]}), 404)
        assert text_of(server.post("/v1/completions", BODY | {"prompt": "", "session": names[1]})) == wanted


def test_a_server_without_a_folder_saves_nothing():
    with running() as server:
        session = server.post("/v1/completions", BODY | {"keep": True})[1]["choices"][0]["session"]
        assert_error(*server.post(f"/v1/sessions/{session}/save"), 400, "unsupported", "--sessions")


@pytest.mark.parametrize("prefix_bytes", [0, 2**24])
def test_prefixes_are_reused_across_requests(prefix_bytes):
    options = EngineOptions(4, vocab_size=BYTES.vocab_size, prefix_bytes=prefix_bytes)
    with running(engine_options=options) as server:
        prompt = "a prompt that comes twice " * 4
        texts = [text_of(server.post("/v1/completions", BODY | {"prompt": prompt})) for _ in range(2)]
        assert texts[0] == texts[1]
        (line,) = [
            x for x in server.send("GET", "/metrics")[2].split(b"\n") if x.startswith(b"hgrn2_reused_tokens_total")
        ]
        assert float(line.split()[1]) == (len(prompt) + 1 if prefix_bytes else 0)


def test_the_folder_of_sessions_is_checked(tmp_path):
    from hgrn2.serve.http.session_store import SessionStore
    from tests.refusals import refuses

    (tmp_path / "file").write_text("")
    with refuses("unwritable", tmp_path / "file"):
        SessionStore(1, tmp_path / "file")
    shutil.rmtree(tmp_path)


def test_threads_that_share_the_store_lose_no_bytes(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from hgrn2.serve import Session
    from hgrn2.serve.http.session_store import SessionStore

    state = tiny_model().init_state(1)
    store = SessionStore(4 * state.num_bytes, tmp_path)
    saved = store.add(Session((1, 2), 1, state, "model"))
    store.save(saved)

    def work(_):
        name = store.add(Session((1, 2), 1, state, "model"))
        assert store.get(saved).tokens == (1, 2)
        return name

    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(work, range(40)))
    assert len(set(names)) == 40
    assert store.num_bytes == len(store) * state.num_bytes <= store.budget_bytes
    assert SessionStore(1, None).add(Session((1, 2), 1, state, "model")) is None
