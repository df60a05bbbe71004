"""Every way through the engine gives the model's own logits."""

import pytest
import torch

from hgrn2.serve import Engine, EngineOptions, Request, RequestSampling
from tests.models.cases import KINDS, config_of, make_model, tokens
from tests.refusals import refuses

GREEDY = RequestSampling(temperature=0)


def prompt(length, seed=1):
    return tokens(length, seed=seed).tolist()


def greedy(ids, max_tokens=6, **settings):
    return Request(ids, max_tokens, GREEDY, return_logits=True, **settings)


def assert_is_the_models(model, found, ids):
    """The logits of a continuation are those of one forward pass over everything."""
    everything = torch.tensor([[*ids, *found.tokens]])
    wanted = model(everything)[0][0, len(ids) - 1 : -1]
    torch.testing.assert_close(torch.stack(found.logits), wanted, rtol=1e-9, atol=1e-10)
    assert found.tokens == wanted.argmax(-1).tolist()


def run(engine, requests):
    return engine.generate(requests)


@pytest.mark.parametrize("name", KINDS)
def test_every_mixer_runs_batched_in_chunks_and_one_after_another(name):
    model = make_model(config_of(name))
    prompts = [prompt(n, seed=n) for n in (1, 7, 23, 40, 2)]
    for options in (EngineOptions(context_limit=64), EngineOptions(2, 2, prefill_tokens=5, context_limit=64)):
        engine = Engine(model, options)
        found = run(engine, [greedy(ids) for ids in prompts])
        for ids, one in zip(prompts, found, strict=True):
            assert one.finish_reason == "length"
            assert_is_the_models(model, one, ids)
        assert engine.num_free_rows == engine.pool.num_rows


@pytest.mark.parametrize("name", ["fla", "full-attention", "window-attention", "griffin-hybrid", "short-conv"])
def test_a_prefix_is_reused_at_any_token(name):
    model = make_model(config_of(name))
    engine = Engine(model, EngineOptions(context_limit=128, prefix_bytes=10**8))
    shared = prompt(60)
    # the second leaves the path of the first after 33 tokens, where the third finds a snapshot
    for tail, reused in ((20, 0), (21, 0), (22, 33)):
        ids = [*shared[:33], *prompt(10, seed=tail)]
        ids[33] = tail
        before = engine.num_reused_tokens
        (found,) = engine.generate([greedy(ids)])
        assert_is_the_models(model, found, ids)
        assert engine.num_reused_tokens - before == reused
    # a continuation is a prefix as well: all but its last token was read
    longer = [*ids, *found.tokens, 3, 4]
    before = engine.num_reused_tokens
    (found,) = engine.generate([greedy(longer)])
    assert_is_the_models(model, found, longer)
    assert engine.num_reused_tokens - before == len(longer) - 3


def test_prefixes_of_one_to_ten_thousand_tokens_are_reused():
    model = make_model(config_of("fla"))
    for length in (1, 2, 100, 10_000):
        engine = Engine(model, EngineOptions(prefix_bytes=10**8))
        ids = prompt(length)
        engine.generate([greedy([*ids, 1], 1, snapshot_at=[length])])
        (found,) = engine.generate([greedy([*ids, 2, 3])])
        assert engine.num_reused_tokens == length
        assert_is_the_models(model, found, [*ids, 2, 3])


def test_snapshots_stay_under_their_budget_and_the_cheap_ones_leave():
    model = make_model(config_of("fla"))
    one = Engine(model).pool.bytes_of(100) + 400
    engine = Engine(model, EngineOptions(prefix_bytes=int(3.5 * one)))
    engine.generate([greedy(prompt(90), 1)])
    for seed in range(8):
        engine.generate([greedy(prompt(4, seed=seed), 1)])
        assert engine.prefixes.num_bytes <= 3.5 * one
    assert engine.prefixes.num_evicted > 4
    # the long one saves more for its bytes
    (found,) = engine.generate([greedy([*prompt(90), 1, 2])])
    assert engine.num_reused_tokens >= 90
    assert_is_the_models(model, found, [*prompt(90), 1, 2])


def test_forks_share_a_prompt_and_differ():
    model = make_model(config_of("full-attention"))
    engine = Engine(model, EngineOptions(2, context_limit=64))
    sampling = RequestSampling(seed=7, temperature=5.0)
    found = engine.generate([Request(prompt(12), 8, sampling, n=5, return_logits=True)])
    assert engine.num_prompt_tokens == 12
    assert len({tuple(one.tokens) for one in found}) == 5
    for one in found:
        everything = torch.tensor([[*prompt(12), *one.tokens]])
        torch.testing.assert_close(torch.stack(one.logits), model(everything)[0][0, 11:-1], rtol=1e-9, atol=1e-10)
    (alone,) = engine.generate([Request(prompt(12), 8, sampling)])
    assert alone.tokens == found[0].tokens


def test_a_long_prompt_does_not_hold_up_decoding_nor_a_short_prompt():
    engine = Engine(make_model(config_of("fla")), EngineOptions(4, 4, prefill_tokens=10))
    first = engine.submit(greedy(prompt(3), 50))
    engine.step()
    engine.submit(greedy(prompt(200), 1))
    short = engine.submit(greedy(prompt(4), 1))
    seen = [event.request_id for event in engine.step()]
    # the short prompt is read at once, beside the long one, and the running request goes on
    assert seen.count(first) == 1
    assert seen.count(short) == 1
    before = engine.num_prompt_tokens
    for _ in range(5):
        assert [event.request_id for event in engine.step()].count(first) == 1
    # and decoding does not hold up the prompt
    assert engine.num_prompt_tokens - before == 50


def test_more_requests_than_rows_are_served_in_the_order_of_arrival():
    engine = Engine(make_model(config_of("fla")), EngineOptions(2, 2))
    numbers = [engine.submit(greedy(prompt(5, seed=i), 4)) for i in range(9)]
    ended = []
    while engine.is_busy:
        ended += [event.request_id for event in engine.step() if event.finish_reason]
    assert ended == numbers


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_cancelled_requests_free_their_rows(steps):
    model = make_model(config_of("fla"))
    engine = Engine(model, EngineOptions(2, 2, prefill_tokens=8))
    numbers = [engine.submit(greedy(prompt(10), 20)) for _ in range(6)]
    for _ in range(steps):
        engine.step()
    for number in numbers[:5]:
        engine.cancel(number)
    tokens_left, cancelled = [], set()
    while engine.is_busy:
        for event in engine.step():
            if event.finish_reason == "cancelled":
                cancelled.add(event.request_id)
            elif event.request_id == numbers[5]:
                tokens_left.append(event.token)
    assert cancelled == set(numbers[:5])
    assert len(tokens_left) == 20
    assert engine.num_free_rows == engine.pool.num_rows
    engine.cancel(numbers[0])


def test_memory_is_flat(capsys):
    """No tensor is left behind by a step, however long the text."""
    import gc

    engine = Engine(make_model(config_of("fla"), torch.float32), EngineOptions(2))
    engine.submit(Request(prompt(3), 700, GREEDY))

    def count():
        for _ in range(200):
            engine.step()
        gc.collect()
        return sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor and x.layout == torch.strided)

    count()
    assert count() == count()


def test_stop_ids_end_a_continuation():
    model = make_model(config_of("fla"))
    engine = Engine(model)
    (whole,) = engine.generate([greedy(prompt(5), 12)])
    stop = whole.tokens[4]
    (found,) = engine.generate([greedy(prompt(5), 12, stop_ids=[stop])])
    assert found.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    assert found.finish_reason == "stop"


def test_a_model_that_is_not_finite_ends_its_requests():
    model = make_model(config_of("fla"), torch.float32)
    model.lm_head.weight.data[3] = float("nan")
    (found,) = Engine(model).generate([greedy(prompt(5), 12)])
    assert (found.tokens, found.finish_reason) == ([], "not-finite")


def test_weights_in_bfloat16_leave_the_model_alone():
    model = make_model(config_of("fla"), torch.float32)
    engine = Engine(model, EngineOptions(weights="bfloat16"))
    (found,) = engine.generate([greedy(prompt(9), 1)])
    assert model.lm_head.weight.dtype == torch.float32
    assert engine.pool.layers[0]["recurrent"].dtype == torch.float32
    wanted = model(torch.tensor([prompt(9)]))[0][0, -1]
    assert (found.logits[0] - wanted).norm() < 0.1 * wanted.norm()


def test_mistakes_are_named():
    model = make_model(config_of("full-attention"))
    engine = Engine(model, EngineOptions(context_limit=32))
    with refuses("invalid-value", "tokens"):
        engine.submit(Request([]))
    with refuses("invalid-value", "tokens", 29, 28):
        engine.submit(Request([29]))
    with refuses("invalid-value", "stop_ids", -1):
        engine.submit(Request([1], stop_ids=[-1]))
    with refuses("invalid-value", "logit_bias", "nan"):
        engine.submit(Request([1], sampling=RequestSampling(logit_bias={1: float("nan")})))
    with refuses("invalid-value", "max_tokens", 0):
        Request([1], 0)
    with refuses("invalid-value", "temperature", -1):
        RequestSampling(temperature=-1)
    with refuses("invalid-value", "context_limit", 32, 33):
        engine.submit(Request([1], 32))
    with refuses("invalid-value", "snapshot_at", 9):
        engine.submit(Request([1], 2, snapshot_at=[9]))
    with refuses("unknown-name", "weights", "int3"):
        EngineOptions(weights="int3")
    with refuses("contradiction", "speculate", "deterministic"):
        EngineOptions(speculate=3)
    with refuses("not-found"):
        engine.pause(99)
    with refuses("not-found"):
        engine.session(99)


def test_a_model_that_reads_both_ways_is_refused():
    model = make_model(config_of("fla"))
    for layer in model.model.layers:
        layer.attn.set_direction("bidirectional")
    with refuses("unsupported"):
        Engine(model)
