"""Load on a server: Poisson arrivals, with clients that leave, requests too large and requests that are not valid.

python benchmarks/serve.py --clients 200 --seconds 60 --rate 40 --verify --out benchmarks/results/serve-cpu.json
python benchmarks/serve.py RUN --prompt-tokens 512 --max-tokens 128 --leave 0 --malformed 0 --oversized 0
python benchmarks/serve.py --url http://127.0.0.1:8000 --model NAME

Without a URL it starts `hgrn2 serve` on a free loopback port, with a run or with a small model of random weights, and
ends it by SIGTERM. Each client sends one request at a time and waits exponentially between two; all of them together
offer `--rate` requests a second. Prompts are random bytes and answers greedy. Times are those of the client, for
answers that came whole: to the first token, and the mean between two tokens. `--verify` compares them with what the
engine writes offline.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import environment  # noqa: F401  (before torch)

PERCENTILES = (50, 90, 99, 100)
# statuses by which a server may refuse what is valid
REFUSALS = (429, 503)
MALFORMED = (
    b"{", b"[]", b'{"prompt": "\xff"}', b'{"prompt": "a", "temperature": -1}', b'{"prompt": ""}', b'{"prompt": [-1]}',
    b'{"prompt": "a", "n": 1000000}', b'{"prompt": "a", "unknown": 1}', b'{"prompt": "a", "max_tokens": 1e9}',
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """Behaviour of the clients.

    Attributes:
        clients: requests at once, at most.
        seconds: time in which requests are sent.
        rate: requests a second that all clients offer.
        prompts: texts to continue.
        max_tokens: tokens to write.
        leave: share of requests whose client leaves after some tokens.
        malformed: share of requests that are not valid.
        oversized: share of requests whose body is too large.
        body_bytes: size of a body that is too large.
        model: name of the model.
        seed: of everything random.
    """

    clients: int
    seconds: float
    rate: float
    prompts: Sequence[str]
    max_tokens: int = 32
    leave: float = 0.1
    malformed: float = 0.05
    oversized: float = 0.02
    body_bytes: int = 2**22 + 2**16
    model: str | None = None
    seed: int = 0


@dataclass
class Found:
    """Observations of the clients.

    Attributes:
        statuses: number of answers by kind of request and status; status 0 is a connection that ended.
        texts: the whole answers, with their prompts.
        first: seconds to the first token of each whole answer.
        between: mean seconds between two tokens of each.
        num_tokens: tokens of whole answers.
        num_left: requests whose client left.
        bad_errors: refusals that are no error objects.
        seconds: time from the first request to the last answer.
    """

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    texts: list[tuple[str, str]] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_left: int = 0
    bad_errors: list[bytes] = field(default_factory=list)
    seconds: float = 0.0

    def unexpected(self) -> dict[str, int]:
        """Return the numbers of answers whose status does not fit their request."""
        wanted = {"whole": (200, *REFUSALS), "leave": (200, *REFUSALS), "malformed": (400,), "oversized": (413,)}
        return {
            f"{kind} {status}": count
            for (kind, status), count in self.statuses.items()
            if status not in wanted[kind] and not (kind == "malformed" and status in REFUSALS)
        }

    def wrong(self, expected: Callable[[str], str]) -> int:
        """Return the number of answers that differ from `expected(prompt)`."""
        return sum(text != expected(prompt) for prompt, text in self.texts)

    def rows(self) -> dict[str, float]:
        """Return the figures by name."""
        found = {"answers/s": len(self.texts) / self.seconds, "tokens/s": self.num_tokens / self.seconds}
        for name, times in (("first token", self.first), ("a token", self.between)):
            found |= {f"{name}, p{p} (ms)": 1e3 * percentile(times, p) for p in PERCENTILES}
        return found


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, the nearest rank above; NaN of nothing.

    Example:
        >>> percentile([3, 1, 2], 50), percentile([3, 1, 2], 100)
        (2, 3)
    """
    ordered = sorted(values)
    return ordered[max(-(-len(ordered) * percent // 100) - 1, 0).__int__()] if ordered else float("nan")


async def put_load(url: str, load: Load) -> Found:
    """Run all clients against a server on this machine.

    Args:
        url: its address.
        load: what they do.
    """
    place = urlsplit(url)
    host, port = place.hostname or "", place.port or 80
    assert host in ("127.0.0.1", "localhost", "::1"), "the load is for a server on this machine"
    found, start = Found(), time.monotonic()

    async def client(number: int) -> None:
        draw = random.Random(f"{load.seed} {number}")
        while True:
            pause = draw.expovariate(load.rate / load.clients)
            if time.monotonic() - start + pause > load.seconds:
                return
            await asyncio.sleep(pause)
            await _request(host, port, load, draw, found)

    await asyncio.gather(*(client(i) for i in range(load.clients)))
    found.seconds = time.monotonic() - start
    return found


async def _request(host: str, port: int, load: Load, draw: random.Random, found: Found) -> None:
    kinds = ("leave", "malformed", "oversized")
    shares = (load.leave, load.malformed, load.oversized)
    (kind,) = draw.choices((*kinds, "whole"), (*shares, max(1 - sum(shares), 0)))
    prompt, after = draw.choice(load.prompts), draw.randint(0, load.max_tokens)
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": load.max_tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    if load.model is not None:
        body["model"] = load.model
    data = json.dumps(body).encode()
    if kind == "malformed":
        data = draw.choice(MALFORMED)
    elif kind == "oversized":
        data = json.dumps({"prompt": "a" * load.body_bytes}).encode()
    status, writer = 0, None
    try:
        reader, writer = await asyncio.open_connection(host, port)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        start = time.monotonic()
        writer.write(head.encode() + data)
        status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        if status != 200:
            error = await reader.read()
            if not re.search(rb'"error": ?\{"message"', error):
                found.bad_errors.append(error[:200])
        else:
            await _read_answer(reader, kind, prompt, after, start, found)
    except (OSError, IndexError):
        # a server that refuses a body may close before it is sent
        pass
    finally:
        found.statuses[kind, status] += 1
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _read_answer(
    reader: asyncio.StreamReader, kind: str, prompt: str, after: int, start: float, found: Found
) -> None:
    text, first, last, usage, count = "", None, start, None, 0
    while line := await reader.readline():
        # an event is a line of its own in the chunks of the body
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        event = json.loads(line[6:])
        assert "error" not in event, event
        last, count = time.monotonic(), count + 1
        first = last if first is None else first
        text += "".join(choice["text"] for choice in event["choices"])
        usage = event.get("usage") or usage
        if kind == "leave" and count > after:
            found.num_left += 1
            return
    if kind == "whole" and usage is not None and first is not None:
        found.texts.append((prompt, text))
        num_tokens = usage["completion_tokens"]
        found.num_tokens += num_tokens
        found.first.append(first - start)
        if num_tokens > 1:
            found.between.append((last - first) / (num_tokens - 1))


def make_prompts(count: int, num_chars: int, seed: int = 0) -> list[str]:
    """Return prompts of lower-case letters and spaces."""
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=num_chars)) for _ in range(count)]


def make_model(folder: Path) -> None:
    """Write a small model of random weights, which reads bytes."""
    import torch

    from hgrn2 import HGRN2LM, HGRN2Config
    from hgrn2.data import ByteTokenizer

    torch.manual_seed(0)
    config = HGRN2Config(
        vocab_size=257,
        hidden_size=64,
        num_hidden_layers=2,
        expand_ratio=32,
        intermediate_size=176,
        initializer_range=0.2,
    )
    HGRN2LM(config).save(folder, ByteTokenizer())


@contextlib.contextmanager
def started(run: Path, words: Sequence[str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start `hgrn2 serve` on a free port; yield its address and the process, and end it by SIGTERM."""
    command = [sys.executable, "-c", "import sys, hgrn2_command; sys.exit(hgrn2_command.main())", "serve", str(run)]
    process = subprocess.Popen([*command, "--port", "0", *words], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if match := re.search(r"http://\S+", line):
                break
            print(line, end="", file=sys.stderr)
        else:
            raise SystemExit("the server did not start")
        yield match.group(), process
    finally:
        process.send_signal(signal.SIGTERM)
        print("server: exit status", process.wait(60))


def offline(run: Path, prompts: Sequence[str], max_tokens: int) -> dict[str, str]:
    """Return what the engine writes after each prompt."""
    from hgrn2.loading import load
    from hgrn2.serve import Engine, EngineOptions, Request, RequestSampling
    from hgrn2.serve.text import TextEngine

    model, tokenizer = load(run, device="cpu")
    engine = TextEngine(Engine(model, EngineOptions(1, vocab_size=tokenizer.vocab_size)), tokenizer)
    request = Request((), max_tokens, RequestSampling(0))
    return {prompt: "".join(engine.stream(prompt, request)) for prompt in prompts}


def metric(url: str, name: str) -> float:
    """Return a value of the server's metrics."""
    from urllib.request import urlopen

    with urlopen(f"{url}/metrics") as answer:
        found = re.search(rf"^{name} (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None, name
    return float(found.group(1))


def resident_mib(process: subprocess.Popen[str]) -> float:
    """Return the memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    return int(found.group(1)) / 1024 if found else float("nan")


def main() -> None:
    """Put a load on a server and print what its clients saw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a run folder; a small model of random weights without it")
    parser.add_argument("--url", help="a server on this machine that runs already")
    parser.add_argument("--model", help="name of its model")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rate", type=float, default=20, help="requests a second")
    parser.add_argument("--prompts", type=int, default=64, help="number of different prompts")
    parser.add_argument("--prompt-chars", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--leave", type=float, default=0.1, help="share of clients that leave")
    parser.add_argument("--malformed", type=float, default=0.05)
    parser.add_argument("--oversized", type=float, default=0.02)
    parser.add_argument("--verify", action="store_true", help="compare with the engine offline")
    parser.add_argument("--serve", nargs="*", default=[], help="words for hgrn2 serve, without the leading --")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    prompts = make_prompts(args.prompts, args.prompt_chars)
    load = Load(
        args.clients, args.seconds, args.rate, prompts, args.max_tokens, args.leave, args.malformed, args.oversized,
        model=args.model,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        run, url, process = args.run, args.url, None
        if url is None:
            if run is None:
                run = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
                make_model(run)
            words = [f"--{word}" if word[0].isalpha() else word for word in args.serve]
            url, process = stack.enter_context(started(run, words))
        expected = offline(run, prompts, args.max_tokens) if args.verify else None
        asyncio.run(put_load(url, Load(4, 1, 8, prompts[:4], 8, 0, 0, 0, model=args.model)))
        before = resident_mib(process) if process is not None else float("nan")
        found = asyncio.run(put_load(url, load))
        rows = found.rows()
        if process is not None:
            rows |= {"memory before (MiB)": before, "memory after (MiB)": resident_mib(process)}
        time.sleep(1)
        rows["rows lost"] = metric(url, "hgrn2_rows") - metric(url, "hgrn2_free_rows")
        if expected is not None:
            rows["wrong answers"] = found.wrong(expected.__getitem__)
        rows["clients that left"] = found.num_left
        for name, value in rows.items():
            print(f"{name:24} {value:10.2f}")
        statuses = {f"{kind} {status}": count for (kind, status), count in sorted(found.statuses.items())}
        print("answers by kind and status:", statuses)
        print(
            "unexpected:", found.unexpected() or "none", "- refusals that are no error objects:", len(found.bad_errors)
        )
    if args.out is not None:
        result = {"load": {**vars(args), "run": str(args.run), "out": None}, "rows": rows, "statuses": statuses}
        args.out.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
