"""The engine on a GPU: graphs, fused layers, and tokens that arrive a step later."""

import pytest
import torch

from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.serve import Engine, EngineOptions, Request, RequestSampling
from hgrn2.serve.graphs import graph_sizes
from tests.models.cases import config_of, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]
GREEDY = RequestSampling(0)


def wide_model(dtype):
    torch.manual_seed(0)
    config = HGRN2Config(
        vocab_size=512, hidden_size=256, num_hidden_layers=3, expand_ratio=128, intermediate_size=704,
        initializer_range=0.1,
    )  # fmt: skip
    return HGRN2LM(config).to("cuda", dtype).eval()


def prompt(length, seed=1, vocab=29):
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests(lengths, vocab=29, **settings):
    return [Request(prompt(n, n, vocab), 12, GREEDY, return_logits=True, **settings) for n in lengths]


def assert_are_the_models(model, asked, found, tolerance):
    for request, one in zip(asked, found, strict=True):
        everything = torch.tensor([[*request.tokens, *one.tokens]], device="cuda")
        wanted = model(everything)[0][0, len(request.tokens) - 1 : -1].float().cpu()
        got = torch.stack(one.logits).float()
        assert (got - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("graphs", [True, False])
def test_fused_layers_at_every_batch_size(dtype, tolerance, graphs):
    model = wide_model(dtype)
    engine = Engine(model, EngineOptions(20, prefill_tokens=64, cuda_graphs=graphs))
    assert engine._step.fused is not None
    for lengths in ((5,), (3, 70), (9, 2, 30, 4), range(1, 20)):
        asked = requests(lengths, 512)
        assert_are_the_models(model, asked, engine.generate(asked), tolerance)
    assert engine.num_free_rows == engine.pool.num_rows


@pytest.mark.parametrize("name", ["fla", "full-attention", "window-attention", "mamba", "griffin-hybrid", "short-conv"])
def test_every_kind_of_state_in_graphs(name):
    model = make_model(config_of(name), torch.float32).cuda()
    engine = Engine(model, EngineOptions(6, context_limit=64, prefill_tokens=16, prefix_bytes=10**8))
    asked = requests((1, 7, 23, 40, 2, 3, 4))
    for _ in range(2):
        assert_are_the_models(model, asked, engine.generate(asked), 2e-3)


@pytest.mark.parametrize("run_ahead", [True, False])
def test_seeds_stops_and_logprobs(run_ahead):
    model = wide_model(torch.float32)
    engine = Engine(model, EngineOptions(8, run_ahead=run_ahead))
    sampling = RequestSampling(1.5, top_p=0.9, seed=3)
    (alone,) = engine.generate([Request(prompt(9), 20, sampling)])
    others = [Request(prompt(5), 30, RequestSampling(top_k=3, presence_penalty=1.0)), Request(prompt(3), 5, GREEDY)]
    found, *_ = engine.generate([Request(prompt(9), 20, sampling, logprobs=2), *others])
    assert found.tokens == alone.tokens
    wanted = model(torch.tensor([[*prompt(9), *found.tokens]], device="cuda"))[0][0, 8:-1].log_softmax(-1)
    torch.testing.assert_close(
        torch.tensor(found.logprobs), wanted[range(20), found.tokens].cpu(), rtol=1e-3, atol=1e-3
    )
    stop = alone.tokens[7]
    (stopped,) = engine.generate([Request(prompt(9), 20, sampling, stop_ids=[stop])])
    assert stopped.tokens == alone.tokens[: alone.tokens.index(stop) + 1]
    assert engine.num_free_rows == engine.pool.num_rows


def test_sessions_go_on_exactly(tmp_path):
    model = wide_model(torch.float32)
    sampling = RequestSampling(1.5, seed=3)
    (wanted,) = Engine(model).generate([Request(prompt(9), 20, sampling)])
    engine = Engine(model)
    number, written = engine.submit(Request(prompt(9), 20, sampling)), []
    while len(written) < 6:
        written += [event.token for event in engine.step()]
    session = engine.pause(number)
    rest = list(session.tokens[9:])
    number = engine.submit(Request((), 20 - len(rest), RequestSampling(1.5)), session)
    while engine.is_busy:
        rest += [event.token for event in engine.step() if event.request_id == number and event.token is not None]
    assert rest == wanted.tokens


def test_memory_is_flat():
    engine = Engine(wide_model(torch.bfloat16), EngineOptions(4))
    engine.submit(Request(prompt(9), 3000, GREEDY))

    def used():
        for _ in range(500):
            engine.step()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    used()
    assert used() == used()


def test_sizes_cover_every_batch():
    assert graph_sizes(256)[-1] == 256
    assert graph_sizes(5) == [1, 2, 4, 5]
