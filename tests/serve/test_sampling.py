"""Tokens have the distribution that a request asks for, and do not depend on what runs beside it."""

import pytest
import torch

from hgrn2.models.sampling import Sampling, sample
from hgrn2.serve import Engine, EngineOptions, Request, RequestSampling
from hgrn2.serve.sampling import Features, SamplingRows, features_of, uniform
from tests.models.cases import config_of, make_model, tokens

VOCAB = 13
EVERYTHING = Features(True, True, True, True, True)


def logits_of(rows, seed=0):
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def frequencies(sampling, logits, count=20_000):
    rows = SamplingRows(count, VOCAB, "cpu")
    for row in range(1):
        rows.set(row, sampling, 0, [])
    for name in ("_floats", "_whole"):
        getattr(rows, name)[:] = getattr(rows, name)[:, :1]
    rows.seed.copy_(torch.arange(count))
    drawn = rows.draw(logits.expand(count, -1), 0, features_of(sampling, False))
    return drawn.tokens.bincount(minlength=VOCAB) / count


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2},
        {"top_k": 5, "top_p": 0.8, "min_p": 0.1, "temperature": 1.7},
    ],
)  # fmt: skip
def test_frequencies_are_those_of_the_model_s_sampling(settings):
    logits = logits_of(1)
    found = frequencies(RequestSampling(**settings), logits)
    many = Sampling(**({"temperature": 1.0} | settings))
    drawn = sample(logits.expand(20_000, -1), many, None, torch.Generator().manual_seed(1))
    wanted = drawn.bincount(minlength=VOCAB) / 20_000
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)
    # what is filtered out is never drawn
    assert (found[wanted == 0] < 1e-3).all()
    assert (found[wanted > 2e-3] > 0).all()


def test_random_numbers_are_uniform_and_do_not_repeat():
    numbers = torch.arange(1000).repeat(50)
    seeds = torch.arange(50).repeat_interleave(1000)
    x = uniform(seeds, numbers)
    assert x.unique().numel() == x.numel()
    assert 0 <= x.min() <= x.max() < 1
    counts = torch.histc(x.float(), 20, 0, 1)
    assert ((counts - 2500).abs() < 5 * 2500**0.5).all()
    pairs = torch.stack([x.view(50, 1000)[:, :-1].flatten(), x.view(50, 1000)[:, 1:].flatten()])
    assert pairs.corrcoef()[0, 1].abs() < 0.02


def test_penalties_and_bias_by_hand():
    rows = SamplingRows(2, VOCAB, "cpu")
    sampling = RequestSampling(0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25,
                               logit_bias={7: 100.0, 3: -4.0})  # fmt: skip
    rows.set(0, RequestSampling(temperature=0), 0, [])
    rows.set(1, sampling, 0, [2, 5])
    rows.replay(1, [5, 9, 9])
    logits = logits_of(2)
    wanted = logits[1].clone()
    for token in (2, 5, 9):
        wanted[token] = wanted[token] / 2 if wanted[token] > 0 else wanted[token] * 2
    wanted[5] -= 0.5 + 0.25
    wanted[9] -= 0.5 + 0.5
    torch.testing.assert_close(rows._penalize(logits, slice(0, 2))[1], wanted)
    assert rows.draw(logits, 0, EVERYTHING).tokens.tolist() == [int(logits[0].argmax()), 7]
    # what was drawn counts
    assert rows._counts[1].tolist() == [0, 0, 0, 0, 0, 1, 0, 1, 0, 2, 0, 0, 0]


def test_a_row_does_not_see_what_others_need():
    sampling = RequestSampling(seed=3)
    for seed in range(30):
        logits = logits_of(4, seed)
        alone, among = SamplingRows(4, VOCAB, "cpu"), SamplingRows(4, VOCAB, "cpu")
        alone.set(2, sampling, seed, [])
        among.set(2, sampling, seed, [])
        among.set(1, RequestSampling(top_k=2, repetition_penalty=3.0, logit_bias={1: 5.0}), 1, [1])
        one = alone.draw(logits[2:3], 2, features_of(sampling, False)).tokens[0]
        assert one == among.draw(logits, 0, EVERYTHING).tokens[2]


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9, "presence_penalty": 0.5}])
def test_seeds_do_not_depend_on_the_batch(settings):
    model = make_model(config_of("fla"))
    requests = [
        Request(tokens(5 + i, seed=i).tolist(), 10, RequestSampling(2.0, seed=i, **(settings if i % 2 else {})))
        for i in range(6)
    ]
    together = Engine(model, EngineOptions(4, prefill_tokens=9)).generate(requests)
    for request, found in zip(requests, together, strict=True):
        (alone,) = Engine(model).generate([request])
        assert alone.tokens == found.tokens
    assert len({tuple(one.tokens) for one in together}) == 6


def test_logprobs_are_the_model_s():
    model = make_model(config_of("fla"))
    ids = tokens(6).tolist()
    sampling = RequestSampling(temperature=3.0, top_k=9, seed=1, presence_penalty=1.0)
    plain, found = Engine(model).generate([Request([1, 2], 5), Request(ids, 7, sampling, logprobs=4)])
    assert plain.logprobs == []
    wanted = model(torch.tensor([[*ids, *found.tokens]]))[0][0, len(ids) - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(
        torch.tensor(found.logprobs), wanted[range(7), found.tokens], check_dtype=False, rtol=1e-5, atol=1e-5
    )
    for top, row in zip(found.top_logprobs, wanted, strict=True):
        best = row.topk(4)
        assert [token for token, _ in top] == best.indices.tolist()
        torch.testing.assert_close(torch.tensor([p for _, p in top]), best.values.float(), rtol=1e-5, atol=1e-5)
