import math

import pytest
import torch

from hgrn2.data import ByteTokenizer, train_bpe
from hgrn2.data.documents import Document, text_document
from hgrn2.inference.scoring import Score, score, total
from hgrn2.models import HGRN2LM, HGRN2Config
from tests.refusals import refuses

BYTES = ByteTokenizer()
TEXT = "A text — with é, 漢 and 🙂.\nAnd a second line.\n"


@pytest.fixture(scope="module", params=["plain", "short-conv", "hybrid"])
def model(request):
    torch.manual_seed(0)
    changes = {
        "plain": {}, "short-conv": {"use_short_conv": True}, "hybrid": {"attn": {"layers": [1], "num_heads": 2}}
    }[request.param]  # fmt: skip
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "expand_ratio": 8, "intermediate_size": 24}
    config = HGRN2Config.from_dict({"vocab_size": 300, "initializer_range": 0.3} | settings | changes)
    return HGRN2LM(config).eval()


def by_hand(model, ids):
    with torch.no_grad():
        p = model(torch.tensor([ids]))[0][0].double().log_softmax(-1)
    return -sum(p[t, ids[t + 1]].item() for t in range(len(ids) - 1))


def document(*pieces):
    return Document("text", iter(pieces))


def test_by_hand(model):
    found = score(model, BYTES, document(TEXT))
    data = TEXT.encode()
    nats = by_hand(model, [256, *data, 256])
    assert (found.num_tokens, found.num_bytes) == (len(data) + 1, len(data))
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / (len(data) + 1)), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nats / len(data) / math.log(2), rel=1e-5)


def test_by_hand_with_longer_tokens(model):
    tokenizer = train_bpe([TEXT * 20], 290)
    ids = tokenizer.encode(TEXT)
    found = score(model, tokenizer, document(TEXT))
    assert found.num_tokens == len(ids) + 1 < len(TEXT.encode())
    assert found.nats == pytest.approx(by_hand(model, [tokenizer.eot_id, *ids, tokenizer.eot_id]), rel=1e-5)
    assert found.num_bytes == len(TEXT.encode())


@pytest.mark.parametrize("window", [1, 2, 7, 64, 68, 69, 10_000])
def test_the_window_does_not_matter(model, window):
    wanted = score(model, BYTES, document(TEXT))
    found = score(model, BYTES, document(TEXT), window)
    assert (found.num_tokens, found.num_bytes) == (wanted.num_tokens, wanted.num_bytes)
    assert found.nats == pytest.approx(wanted.nats, rel=1e-5)
    in_pieces = score(model, BYTES, document(TEXT[:9], TEXT[9:10], TEXT[10:]), window)
    assert in_pieces.nats == pytest.approx(wanted.nats, rel=1e-5)


def test_long_texts_are_read_as_they_are_needed(model):
    class Watched:
        def __init__(self):
            self.lengths, self.lm_head = [], model.lm_head

        def loss(self, ids, targets, state):
            self.lengths.append((ids.shape[1], produced[0]))
            return torch.zeros(()), None, state

    produced = [0]

    def pieces():
        for _ in range(50):
            produced[0] += 1
            yield "x" * 100

    watched = Watched()
    found = score(watched, BYTES, Document("long", pieces()), 100)  # type: ignore[arg-type]
    assert found.num_bytes == 5000
    # no more than a window at a time, each as soon as there is enough for it
    assert [length for length, _ in watched.lengths] == [100] * 50 + [1]
    assert [seen for _, seen in watched.lengths[:50]] == list(range(1, 51))


def test_totals():
    both = total([Score("a", 4 * math.log(2), 4, 2), Score("b", 8 * math.log(2), 2, 10)])
    assert both == Score("total", pytest.approx(12 * math.log(2)), 6, 12)  # type: ignore[arg-type]
    assert both.bits_per_byte == pytest.approx(1)
    assert both.perplexity == pytest.approx(4)


def test_hopeless_models_do_not_overflow():
    assert Score("a", 1e9, 1, 1).perplexity == math.inf


def test_no_text(model, tmp_path):
    with refuses("unreadable", "text"):
        score(model, BYTES, document())
    (tmp_path / "empty").write_text("")
    with refuses("unreadable", tmp_path / "empty"):
        score(model, BYTES, text_document("empty", tmp_path / "empty"))


def test_weights_that_are_not_finite(model):
    with torch.no_grad():
        before = model.model.norm.weight.clone()
        model.model.norm.weight.fill_(float("nan"))
        try:
            with refuses("not-finite", "nan"):
                score(model, BYTES, document(TEXT))
        finally:
            model.model.norm.weight.copy_(before)
