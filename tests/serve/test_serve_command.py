"""The commands `hgrn2 serve` and `hgrn2 chat`: signals, keys, sessions after a kill, control characters."""

import http.client
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch

import hgrn2_command
from hgrn2 import HGRN2LM, HGRN2Config, cli
from hgrn2.cli.serve import open_model
from hgrn2.data import ByteTokenizer
from hgrn2.serve.http.app import make_app  # noqa: F401  (skipped without the extra)
from tests.refusals import refuses

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    config = HGRN2Config(
        vocab_size=257, hidden_size=16, num_hidden_layers=2, expand_ratio=8, intermediate_size=24, initializer_range=0.5
    )
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    HGRN2LM(config).save(folder, BYTES)
    return folder


class Process:
    def __init__(self, run, *words, **settings):
        path = str(Path(hgrn2_command.__file__).parent)
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import sys, hgrn2_command; sys.exit(hgrn2_command.main())", "serve", str(run),
             "--port", "0", "--device", "cpu", *map(str, words)],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path, **settings},
        )  # fmt: skip
        self.told = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.told.append(line)
            if match := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(match.group(1))
                return
        raise AssertionError(self.told)

    def post(self, path, body, headers=()):
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        link.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **dict(headers)})
        answer = link.getresponse()
        found = answer.status, json.loads(answer.read())
        link.close()
        return found

    def metrics(self):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            return answer.read().decode()

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=60)
        assert "Traceback" not in rest, rest
        return self.process.returncode


@pytest.mark.slow
def test_sigterm_lets_running_requests_end_and_a_kill_loses_no_saved_session(run, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("secret\n\nother\n")
    server = Process(run, "--sessions", tmp_path / "sessions", "--api-key-file", keys, HGRN2_API_KEY="third")
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 12, "temperature": 0, "keep": True}
    assert server.post("/v1/completions", body)[0] == 401
    for key in ("secret", "other", "third"):
        headers = {"Authorization": f"Bearer {key}"}
        status, found = server.post("/v1/completions", body, headers)
        assert status == 200
    session = found["choices"][0]["session"]
    assert server.post(f"/v1/sessions/{session}/save", {}, headers)[0] == 200
    more = {"prompt": "", "session": session, "max_tokens": 8, "temperature": 0}
    wanted = server.post("/v1/completions", more, headers)[1]["choices"]
    assert server.end(signal.SIGKILL) == -signal.SIGKILL

    server = Process(run, "--sessions", tmp_path / "sessions", "--max-batch", 2)
    assert server.post("/v1/completions", more)[1]["choices"] == wanted
    results = []
    long = {"prompt": "Hi", "max_tokens": 300, "n": 2, "temperature": 1, "seed": 1, "logit_bias": {"256": -100}}
    worker = threading.Thread(target=lambda: results.append(server.post("/v1/completions", long)))
    worker.start()
    end = time.monotonic() + 20
    while "hgrn2_running 2.0" not in server.metrics() and not results and time.monotonic() < end:
        time.sleep(0.01)
    assert server.end() == 0
    worker.join(20)
    status, found = results[0]
    assert status == 200
    assert found["usage"]["completion_tokens"] == 600


def test_a_folder_without_a_tokenizer_is_served_as_token_ids(run, tmp_path, capsys):
    folder = Path(shutil.copytree(run, tmp_path / "bare"))
    assert open_model(folder, device="cpu")[1].vocab_size == BYTES.vocab_size
    for file in folder.glob("*tokenizer*"):
        file.unlink()
    model, tokenizer = open_model(folder, device="cpu")
    assert tokenizer is None
    assert model.config.vocab_size == 257
    assert "no tokenizer" in capsys.readouterr().err
    with refuses("not-found", "elsewhere"):
        open_model(tmp_path / "elsewhere")


def refused(capsys, *words):
    assert cli.main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_mistakes_of_the_command_are_named(run, tmp_path, capsys):
    assert "missing" in refused(capsys, "serve", tmp_path / "missing")
    assert "keys" in refused(capsys, "serve", run, "--api-key-file", tmp_path / "keys")
    (tmp_path / "keys").write_text("\n")
    assert "no key" in refused(capsys, "serve", run, "--api-key-file", tmp_path / "keys")
    assert "port" in refused(capsys, "serve", run, "--port", "99999")
    assert "max_batch" in refused(capsys, "serve", run, "--max-batch", "0")
    assert "203.0.113.7" in refused(capsys, "serve", run, "--host", "203.0.113.7", "--device", "cpu")


@pytest.mark.parametrize("package", ["uvicorn", "fastapi", "prometheus_client"])
def test_a_missing_package_is_named_with_its_extra(run, capsys, monkeypatch, package):
    for name in [name for name in sys.modules if name.startswith("hgrn2.serve.http")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    error = refused(capsys, "serve", run)
    assert package in error
    assert "serve" in error.partition(package)[2]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def talk(run, monkeypatch):
    def start(text, *words, out=None):
        out = out or io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        monkeypatch.setattr(sys, "stdout", out)
        assert cli.main(["chat", str(run), "--device", "cpu", "--max-tokens", "20", *words]) == 0
        return out.getvalue()

    return start


def test_a_chat_remembers_what_was_said(talk, run):
    from hgrn2.loading import load
    from hgrn2.serve import Engine, EngineOptions, Request, RequestSampling
    from hgrn2.serve.chat import ChatFormat
    from hgrn2.serve.text import TextEngine

    model, tokenizer = load(run, device="cpu")
    engine, form = TextEngine(Engine(model, EngineOptions(1, vocab_size=257)), tokenizer), ChatFormat(tokenizer)
    messages, wanted = [{"role": "system", "content": "Be kind."}], []
    for line in ("Hi", "And?"):
        messages.append({"role": "user", "content": line})
        wanted.append("".join(engine.stream(form.encode(messages), Request((), 20, RequestSampling(0)), form.stop)))
        messages.append({"role": "assistant", "content": wanted[-1].strip()})
    words = ("--temperature", "0", "--system", "Be kind.")
    assert talk("Hi\nAnd?\n", *words) == "".join(f"{one.lstrip(' ')}\n" for one in wanted)
    # /back takes one exchange back, /new all of them
    first, second, third = (f"{wanted[i].lstrip(' ')}\n" for i in (0, 1, 0))
    assert talk("Hi\nAnd?\n/back\nAnd?\n/new\nHi\n/quit\nHi\n", *words) == first + second + second + third


def test_control_characters_are_shown_on_a_terminal(talk):
    words = ("--temperature", "2", "--seed", "2", "--max-tokens", "300")
    raw = talk("Hi\n", *words)
    assert any(c < " " and c not in "\n\t" for c in raw)
    shown = talk("Hi\n", *words, out=Terminal())
    assert not any((c < " " and c not in "\n\t") or "\x7f" <= c < "\xa0" for c in shown)
    assert shown.startswith("> ")


def test_a_message_that_is_not_utf_8_is_refused(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), "utf-8"))
    assert "UTF-8" in refused(capsys, "chat", run, "--device", "cpu")
