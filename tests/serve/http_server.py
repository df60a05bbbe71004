"""A server on a free loopback port, in a thread of the test's process."""

import http.client
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import torch

from hgrn2.data import ByteTokenizer
from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.serve import Engine, EngineOptions
from hgrn2.serve.http.options import ServerOptions
from hgrn2.serve.http.run import HttpServer, listen
from hgrn2.serve.text import TextEngine

BYTES = ByteTokenizer()
OPTIONS = EngineOptions(4, vocab_size=BYTES.vocab_size, prefix_bytes=2**24)


def tiny_model(seed=0, vocab_size=BYTES.vocab_size):
    """Make a model in float64, in which the rounding of a batch's size changes no token."""
    torch.manual_seed(seed)
    config = HGRN2Config(
        vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2, expand_ratio=8, intermediate_size=24,
        initializer_range=0.5,
    )  # fmt: skip
    return HGRN2LM(config).double().eval()


class EndlessTokenizer(ByteTokenizer):
    """Bytes without a token that ends a text, for answers that last until something else ends them."""

    end_ids = frozenset()


class Running:
    """A server that runs.

    Attributes:
        engine: its engine; the server's thread calls it.
        port: its port.
    """

    def __init__(self, server, engine, port):
        self.server, self.engine, self.port = server, engine, port
        self.url = f"http://127.0.0.1:{port}"

    def send(self, method, path, body=None, headers=()):
        """Return the status, the headers and the body, parsed if it is JSON; a body of bytes is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json", **dict(headers)})
            answer = connection.getresponse()
            text = answer.read()
            found = dict(answer.getheaders())
            is_json = found.get("content-type", "").startswith("application/json")
            return answer.status, found, json.loads(text) if is_json else text
        finally:
            connection.close()

    def post(self, path, body=None, headers=()):
        """Return the status and the body."""
        status, _, found = self.send("POST", path, body, headers)
        return status, found

    def wait_until_idle(self, seconds=20):
        """Wait until no request is open, and check that no row is lost."""
        end = time.monotonic() + seconds
        pool = self.engine.engine.pool
        while time.monotonic() < end:
            state = self.server.completions.thread.state
            if not self.server.completions._num_open and state.num_free_rows == pool.num_rows and not state.num_waiting:
                return
            time.sleep(0.01)
        raise AssertionError((self.server.completions._num_open, self.server.completions.thread.state))


@contextmanager
def running(model=None, tokenizer=BYTES, options=None, engine_options=OPTIONS):
    """Run a server; at the end all rows must be free."""
    engine = TextEngine(Engine(model or tiny_model(), engine_options), tokenizer)
    options = replace(options or ServerOptions(), port=0)
    server, listener = HttpServer(engine, options), listen(options)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    found = Running(server, engine, listener.getsockname()[1])
    try:
        yield found
        found.wait_until_idle()
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def assert_error(status, body, wanted, *names):
    """The answer is an error object of OpenAI's interface with this status, whose message holds some names."""
    assert status == wanted, body
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    for name in names:
        assert str(name) in json.dumps(body), (name, body)
