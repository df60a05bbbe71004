"""With deterministic = True, the last bit of every logit is a function of the text alone."""

import pytest
import torch

from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.serve import Engine, EngineOptions, Request, RequestSampling
from tests.models.cases import config_of, make_model, tokens
from tests.refusals import refuses

LENGTHS = (1, 5, 8, 33, 40, 9)


def model_of(name):
    if name != "wide":
        return make_model(config_of(name), torch.float32)
    torch.manual_seed(0)
    config = HGRN2Config(
        vocab_size=29,
        hidden_size=192,
        num_hidden_layers=2,
        expand_ratio=32,
        intermediate_size=341,
        initializer_range=0.1,
    )
    return HGRN2LM(config).eval()


def requests(**settings):
    greedy = RequestSampling(0)
    return [Request(tokens(n, seed=n).tolist(), 9, greedy, return_logits=True, **settings) for n in LENGTHS]


def run(model, asked, *sizes, **options):
    engine = Engine(model, EngineOptions(*sizes, deterministic=True, context_limit=64, **options))
    return engine.generate(asked), engine


@pytest.mark.parametrize(
    "name",
    [
        "fla",
        "wide",
        "full-attention",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mamba", "griffin-hybrid")),
    ],
)
def test_logits_do_not_depend_on_the_batch_the_chunks_or_the_cache(name):
    model = model_of(name)
    alone = [run(model, [request], 1, 1)[0][0] for request in requests()]
    ways = [((8, 3), {"prefill_tokens": 7}), ((16, 8), {"prefill_tokens": 13, "prefix_bytes": 10**8}), ((3, 8), {})]
    for sizes, options in ways:
        found, engine = run(model, requests(), *sizes, **options)
        # the second time some prefixes are in the cache
        again = engine.generate(requests(snapshot_at=[1]) if options.get("prefix_bytes") else requests())
        for one, two, wanted in zip(found, again, alone, strict=True):
            assert torch.equal(torch.stack(one.logits), torch.stack(wanted.logits))
            assert torch.equal(torch.stack(two.logits), torch.stack(wanted.logits))
        assert engine.prefixes is None or engine.num_reused_tokens > 0


def test_logits_are_the_model_s():
    model = make_model(config_of("fla"))
    for request, found in zip(requests(), run(model, requests(), 4)[0], strict=True):
        wanted = model(torch.tensor([[*request.tokens, *found.tokens]]))[0][0, len(request.tokens) - 1 : -1]
        torch.testing.assert_close(torch.stack(found.logits), wanted, rtol=1e-9, atol=1e-10)


def test_drafts_do_not_change_a_token_nor_a_bit():
    model = model_of("wide")
    # a text that repeats, and stops in the middle of what was drafted
    text = tokens(7, seed=2).tolist() * 4
    asked = [Request(text, 60, RequestSampling(0), return_logits=True), *requests()[:2]]
    (plain, *others), _ = run(model, asked, 8)
    (found, *rest), engine = run(model, asked, 8, speculate=5)
    for one, wanted in zip([found, *rest], [plain, *others], strict=True):
        assert one.tokens == wanted.tokens
        assert torch.equal(torch.stack(one.logits), torch.stack(wanted.logits))
    assert 0 < engine.num_accepted < engine.num_drafted
    stopped = Request(text, 60, RequestSampling(0), stop_ids=[plain.tokens[40]])
    assert run(model, [stopped], 8, speculate=5)[0][0].tokens == run(model, [stopped], 8)[0][0].tokens


def test_drafts_go_on_after_a_pause_and_beside_sampled_requests():
    model = model_of("wide")
    text = tokens(7, seed=2).tolist() * 4
    ((plain,), _) = run(model, [Request(text, 40, RequestSampling(0))], 8)
    engine = Engine(model, EngineOptions(8, deterministic=True, speculate=5))
    number, written = engine.submit(Request(text, 40, RequestSampling(0))), []
    while len(written) < 10:
        written += [event.token for event in engine.step()]
    session = engine.pause(number)
    engine.submit(Request(text, 5))
    number = engine.submit(Request((), 40 - len(written), RequestSampling(0)), session)
    while engine.is_busy:
        written += [event.token for event in engine.step() if event.request_id == number and event.token is not None]
    assert written == plain.tokens


def test_drafts_need_layers_that_can_go_back():
    with refuses("unsupported", "speculate"):
        Engine(model_of("mamba"), EngineOptions(deterministic=True, speculate=2))
