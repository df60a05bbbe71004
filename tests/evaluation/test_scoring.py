"""Continuations of any length after contexts of any length: what one pass gives, in bounded memory."""

import pytest
import torch
from torch import nn

from hgrn2.evaluation import scoring
from hgrn2.evaluation.scoring import affordable_rows, score_pairs
from hgrn2.models.cost import cost
from tests.hf.cases import KINDS, both, tokens
from tests.refusals import refuses

LENGTHS = [(1, 1), (1, 40), (30, 3), (7, 1), (7, 9), (50, 20), (2, 2)]


def made_pairs():
    pairs = [(tokens(a, seed=a).tolist(), tokens(b, seed=10 * b).tolist()) for a, b in LENGTHS]
    # the same contexts again, with other continuations, and a pair twice
    return [*pairs, (pairs[2][0], [3, 1, 4, 1, 5]), (pairs[2][0], [3]), pairs[4]]


@torch.no_grad()
def one_pass(own, context, rest):
    log_p = own(torch.tensor([[*context, *rest]]))[0][0].double().log_softmax(-1)[len(context) - 1 : -1]
    nats = log_p.gather(1, torch.tensor(rest)[:, None]).sum()
    return nats.item(), bool((log_p.argmax(-1) == torch.tensor(rest)).all())


@torch.no_grad()
def plain_loop(own, context, rest):
    state, nats = own.init_state(1), 0.0
    for i, token in enumerate([*context, *rest][:-1]):
        logits, state = own.step(torch.tensor([token]), state)
        if i >= len(context) - 1:
            nats += logits[0].log_softmax(-1)[rest[i - len(context) + 1]].item()
    return nats


def scored(model, pairs, *sizes):
    found = dict(x for batch in score_pairs(model, pairs, *sizes) for x in batch)
    assert sorted(found) == list(range(len(pairs)))
    return [found[i] for i in range(len(pairs))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass(kind):
    own, model = both(kind)
    pairs = made_pairs()
    wanted = [one_pass(own, *pair) for pair in pairs]
    for rows, piece in [(1, 1), (1, 7), (3, 7), (3, 4096), (16, 3), (16, 64), (16, 4096)]:
        for found, (nats, is_greedy) in zip(scored(model, pairs, rows, piece), wanted, strict=True):
            assert found.nats == pytest.approx(nats, rel=1e-9)
            assert found.is_greedy == is_greedy
    assert wanted[1][0] == pytest.approx(plain_loop(own, *pairs[1]), rel=1e-9)
    assert wanted[5][0] == pytest.approx(plain_loop(own, *pairs[5]), rel=1e-9)


def test_the_likeliest_tokens_are_seen_as_such():
    own, model = both("fla")
    context = tokens(9).tolist()
    rest = []
    for _ in range(8):
        with torch.no_grad():
            rest.append(int(own(torch.tensor([context + rest]))[0][0, -1].argmax()))
    last = [*rest[:-1], (rest[-1] + 1) % 29]
    first = [(rest[0] + 1) % 29, *rest[1:]]
    found = scored(model, [(context, rest), (context, last), (context, first)], 4, 8)
    assert [x.is_greedy for x in found] == [True, False, False]


@pytest.mark.parametrize("pair", [(3, 3000), (3000, 3)])
def test_memory_does_not_grow_with_the_length(pair, monkeypatch):
    """Tokens per forward pass and logits kept at a time have a limit at every length."""
    _, model = both("fla", torch.float32)
    monkeypatch.setattr(scoring, "PIECE_LOGITS", 29 * 50)
    sizes: dict[str, list[int]] = {"tokens": [], "logits": []}
    model.model.register_forward_hook(lambda *x: sizes["tokens"].append(x[-1].last_hidden_state[..., 0].numel()))
    model.lm_head.register_forward_hook(lambda *x: sizes["logits"].append(x[-1].numel()))
    pairs = [(tokens(pair[0], seed=i).tolist(), tokens(pair[1], seed=9 + i).tolist()) for i in range(3)]
    scored(model, pairs, 3, 128)
    assert max(sizes["tokens"]) <= 128
    assert max(sizes["logits"]) <= 29 * 50
    assert sum(sizes["tokens"]) == 3 * (sum(pair) - 1)
    # of the continuations alone
    assert sum(sizes["logits"]) == 3 * pair[1] * 29


def test_a_shared_context_is_read_once():
    _, model = both("fla")
    read = []
    model.model.register_forward_hook(lambda *x: read.append(x[-1].last_hidden_state[..., 0].numel()))
    context = tokens(200).tolist()
    scored(model, [(context, [i]) for i in range(5)], 5)
    assert read == [199, 5]


def test_rows_that_fit(monkeypatch):
    _, linear = both("fla", torch.float32)
    _, hybrid = both("full-attention", torch.float32)
    assert affordable_rows(linear, 10**9) == affordable_rows(linear, 1) == scoring.MOST_ROWS
    # keys and values of a billion tokens fit no row, which is tried all the same
    assert affordable_rows(hybrid, 10**9) == 1
    assert affordable_rows(hybrid, 1) == scoring.MOST_ROWS
    _, window = both("window-attention", torch.float32)
    assert affordable_rows(window, 10**9) == scoring.MOST_ROWS
    monkeypatch.setattr(scoring, "STATE_BYTES", 0)
    assert affordable_rows(linear, 1) == 1


def test_rows_that_fit_a_gpu(monkeypatch):
    _, model = both("fla", torch.float32)
    row_bytes = 2 * cost(model.config.model_config).state_bytes
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    for free, rows in [(0, 1), (2 * 5 * row_bytes, 5), (2 * 5 * row_bytes - 1, 4), (10**12, scoring.MOST_ROWS)]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        assert affordable_rows(model, 100) == rows


def test_outputs_that_are_not_finite():
    _, model = both("fla", torch.float32)
    nn.init.constant_(model.model.norm.weight, float("nan"))
    with refuses("not-finite"):
        scored(model, [([1], [2])], 1)


def test_nothing_to_score():
    _, model = both("fla", torch.float32)
    assert list(score_pairs(model, [], 4)) == []
