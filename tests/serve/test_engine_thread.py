"""The engine's thread: what handlers get is what the engine writes alone, on the CPU and on a GPU."""

import asyncio

import pytest
import torch

from hgrn2.data import ByteTokenizer
from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.serve import Engine, EngineOptions, Request, RequestSampling
from hgrn2.serve.http.engine_thread import EngineThread
from hgrn2.serve.text import TextEngine
from tests.refusals import refuses

BYTES = ByteTokenizer()
OPTIONS = EngineOptions(4, vocab_size=BYTES.vocab_size, prefix_bytes=2**24)
ON_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
)
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]


def text_engine(device):
    torch.manual_seed(0)
    config = HGRN2Config(
        vocab_size=257,
        hidden_size=64,
        num_hidden_layers=2,
        expand_ratio=32,
        intermediate_size=96,
        initializer_range=0.3,
    )
    return TextEngine(Engine(HGRN2LM(config).to(device).eval(), OPTIONS), BYTES)


async def read(stream):
    """Texts, token ids and sessions by prompt and continuation."""
    texts, tokens, sessions = {}, {}, {}
    while (piece := await stream.next()) is not None:
        key = (piece.prompt, piece.event.token.index)
        texts[key] = texts.get(key, "") + piece.event.text
        if piece.event.token.token is not None:
            tokens.setdefault(key, []).append(piece.event.token.token)
        if piece.session is not None:
            sessions[key] = piece.session
    return texts, tokens, sessions


@pytest.fixture(params=DEVICES)
def thread(request):
    found = EngineThread(text_engine(request.param))
    found.start()
    yield found
    found.close()
    engine = found.engine.engine
    assert engine.num_free_rows == engine.pool.num_rows


def test_streams_side_by_side_are_those_of_the_engine_alone(thread):
    device = thread.engine.engine.device
    prompts = [[*BYTES.start_ids, *text.encode()] for text in ("Hi", "a longer prompt", "x", "Hi there")]
    seeds = [RequestSampling(0.8, seed=seed) for seed in range(3)]
    alone = text_engine(device)
    wanted = {
        (i, k): "".join(alone.stream(prompt, Request((), 30, sampling), ["e"]))
        for i, sampling in enumerate(seeds)
        for k, prompt in enumerate(prompts)
    }

    async def talk():
        streams = [await thread.submit(prompts, Request((), 30, sampling), ["e"], None) for sampling in seeds]
        return await asyncio.gather(*(read(stream) for stream in streams))

    found = asyncio.run(talk())
    texts = {(i, k): text for i, (texts, _, _) in enumerate(found) for (k, _), text in texts.items()}
    assert texts == wanted
    assert len(set(texts.values())) > 6


def test_a_session_is_kept_at_the_end_and_at_a_pause(thread):
    prompt = [*BYTES.start_ids, *b"Hi"]
    greedy = Request((), 400, RequestSampling(0), keep=True, stop_ids=())

    async def talk():
        _, whole, _ = await read(await thread.submit([prompt], Request((), 40, RequestSampling(0)), (), None))
        stream = await thread.submit([prompt], greedy, (), None)
        first = [(await stream.next()).event.token.token for _ in range(3)]
        sessions = await thread.pause(stream)
        _, rest, _ = await read(stream)
        written = [*first, *rest.get((0, 0), [])]
        assert written == whole[0, 0][: len(written)] or len(written) > 40
        if not sessions:
            # it ended before the pause
            return
        (session,) = sessions.values()
        assert list(session.tokens) == [*prompt, *written]
        more = await thread.submit([()], Request((), 5, RequestSampling(0), keep=True), (), session)
        _, tokens, kept = await read(more)
        assert list(kept[0, 0].tokens) == [*session.tokens, *tokens[0, 0]]

    asyncio.run(talk())


def test_a_batch_with_a_bad_prompt_is_refused_whole(thread):
    async def talk():
        with refuses("invalid-value", "999"):
            await thread.submit([[1], [999]], Request((), 5), (), None)
        stream = await thread.submit([[1]], Request((), 5), (), None)
        thread.leave(stream)
        assert await stream.next() is None

    asyncio.run(talk())


def test_a_thread_that_has_ended_refuses(thread):
    thread.close()

    async def talk():
        with refuses("unavailable"):
            await thread.submit([[1]], Request((), 5), (), None)

    asyncio.run(talk())
