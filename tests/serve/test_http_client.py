"""The official client talks to the server as to any other."""

import openai
import pytest

from hgrn2.serve import Engine, Request, RequestSampling
from hgrn2.serve.chat import ChatFormat
from hgrn2.serve.text import TextEngine
from tests.serve.http_server import BYTES, OPTIONS, EndlessTokenizer, running, tiny_model

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server():
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def offline(prompt, stop=(), **settings):
    """Texts, tokens and log-probabilities of the engine alone."""
    engine = TextEngine(Engine(tiny_model(), OPTIONS), BYTES)
    request = Request((), **settings)
    number = engine.submit(prompt, request, stop)
    texts, tokens, reasons = ([start() for _ in range(request.n)] for start in (str, list, str))
    while engine.engine.is_busy:
        for event in engine.step():
            assert event.token.request_id == number
            texts[event.token.index] += event.text
            tokens[event.token.index].append(event.token)
            reasons[event.token.index] = event.finish_reason
    return texts, tokens, reasons


def test_a_completion_is_the_engines(client):
    sampling = RequestSampling(0.7, top_p=0.9, frequency_penalty=0.5, presence_penalty=0.1, seed=5)
    texts, tokens, reasons = offline("Hi", max_tokens=20, sampling=sampling, n=3)
    answer = client.completions.create(
        model="hgrn2", prompt="Hi", max_tokens=20, temperature=0.7, top_p=0.9, frequency_penalty=0.5,
        presence_penalty=0.1, seed=5, n=3,
    )  # fmt: skip
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.finish_reason for choice in answer.choices] == reasons
    assert len(set(texts)) == 3
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.completion_tokens == sum(map(len, tokens))
    assert answer.usage.total_tokens == 3 + sum(map(len, tokens))
    assert answer.object == "text_completion"


def test_a_stream_is_the_whole_answer(client):
    settings = {"model": "hgrn2", "prompt": "Hi", "max_tokens": 20, "seed": 5, "n": 2, "logprobs": 2}
    whole = client.completions.create(**settings)
    texts, tokens, reasons, usage = ["", ""], [[], []], [None, None], None
    for chunk in client.completions.create(**settings, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            reasons[choice.index] = choice.finish_reason
        usage = chunk.usage or usage
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_several_prompts_are_numbered_one_after_the_other(client):
    greedy = RequestSampling(0)
    wanted = [offline(prompt, max_tokens=6, sampling=greedy)[0][0] for prompt in ("Hi", "Ho")]
    answer = client.completions.create(model="hgrn2", prompt=["Hi", "Ho"], max_tokens=6, temperature=0, n=2)
    assert [choice.text for choice in answer.choices] == [wanted[0]] * 2 + [wanted[1]] * 2
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    ids = [[*BYTES.start_ids, *b"Hi"], [*BYTES.start_ids, *b"Ho"]]
    answer = client.completions.create(model="hgrn2", prompt=ids, max_tokens=6, temperature=0)
    assert [choice.text for choice in answer.choices] == wanted


def test_log_probabilities_are_the_models(client):
    _, (events,), _ = offline("Hi", max_tokens=12, sampling=RequestSampling(seed=3), logprobs=3)
    wanted = [event.logprob for event in events]
    answer = client.completions.create(model="hgrn2", prompt="Hi", max_tokens=12, seed=3, logprobs=3)
    found = answer.choices[0].logprobs
    assert found.token_logprobs == pytest.approx(wanted)
    assert [len(top) for top in found.top_logprobs] == [3] * 12

    # the bytes of all tokens are the text
    def data(token):
        return bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:") else token.encode()

    assert b"".join(map(data, found.tokens)).decode("utf-8", "replace") == answer.choices[0].text
    assert found.text_offset == sorted(found.text_offset)
    chat = client.chat.completions.create(
        model="hgrn2", messages=MESSAGES, max_completion_tokens=12, seed=3, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content
    assert bytes(b for one in content for b in one.bytes).decode("utf-8", "replace") == chat.choices[0].message.content
    assert all(len(one.top_logprobs) == 2 for one in content)


def test_a_stop_text_across_tokens_ends_the_answer(client):
    (whole,), _, _ = offline("Hi", max_tokens=40, sampling=RequestSampling(0.7, seed=5))
    stop = next(whole[i : i + 3] for i in range(6, len(whole)) if whole[i : i + 3].isascii())
    settings = {"model": "hgrn2", "prompt": "Hi", "max_tokens": 40, "temperature": 0.7, "seed": 5, "stop": [stop]}
    answer = client.completions.create(**settings, logprobs=0)
    assert answer.choices[0].text == whole.partition(stop)[0]
    assert answer.choices[0].finish_reason == "stop"
    # tokens of the stop text have no log-probabilities
    assert all(at < len(answer.choices[0].text) for at in answer.choices[0].logprobs.text_offset)
    chunks = list(client.completions.create(**settings, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_chat_without_a_template_has_the_plain_form(client):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    form = ChatFormat(BYTES)
    prompt = form.encode([messages[0], {"role": "user", "content": "Hi"}])
    assert BYTES.decode(prompt) == "Be kind.\n\nUser: Hi\n\nAssistant:"
    (text,), _, _ = offline(prompt, max_tokens=15, sampling=RequestSampling(seed=8), stop=form.stop)
    settings = {"model": "hgrn2", "messages": messages, "max_tokens": 15, "seed": 8}
    answer = client.chat.completions.create(**settings)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(prompt)
    chunks = list(client.chat.completions.create(**settings, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    # an answer of the client's own can be sent back as it is
    again = [*messages, answer.choices[0].message, {"role": "user", "content": "And?"}]
    assert client.chat.completions.create(model="hgrn2", messages=again, max_tokens=3).choices[0].finish_reason


def test_models_are_listed(client):
    (model,) = client.models.list().data
    assert client.models.retrieve("hgrn2") == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other/model")
    assert caught.value.code == "model_not_found"


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="Hi")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="hgrn2", prompt="Hi", temperature=-1)
    assert caught.value.param == "temperature"


def test_a_client_that_leaves_ends_its_request():
    with (
        running(tokenizer=EndlessTokenizer()) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        with client.completions.create(model="hgrn2", prompt="Hi", max_tokens=4096, n=8, stream=True) as stream:
            next(iter(stream))
        server.wait_until_idle()
        # and one who waits for a whole answer
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(model="hgrn2", prompt="Hi", max_tokens=4096, n=8, timeout=0.3)
        server.wait_until_idle()
        assert b"hgrn2_abandoned_requests_total 2.0" in server.send("GET", "/metrics")[2]


def test_extensions_pass_through(client):
    answer = client.completions.create(
        model="hgrn2", prompt="Hi", max_tokens=9, seed=1,
        extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.2, "return_token_ids": True},
    )  # fmt: skip
    _, (events,), _ = offline("Hi", max_tokens=9, sampling=RequestSampling(0, repetition_penalty=1.2))
    assert answer.choices[0].token_ids == [event.token for event in events]
