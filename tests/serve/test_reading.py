"""A text that is read with the engine's decode step has the model's logits and its state."""

import pytest
import torch

from hgrn2.serve.reading import EngineReader, PlainReader, fast_reader
from tests.models.cases import config_of, make_model, tokens


@pytest.mark.parametrize("name", ["fla", "window-attention", "mamba", "short-conv", "griffin-hybrid"])
def test_readers_agree(name, monkeypatch):
    monkeypatch.setattr("hgrn2.serve.reading.PREFILL_TOKENS", 4)
    model = make_model(config_of(name))
    fast, plain = fast_reader(model), PlainReader(model)
    assert isinstance(fast, EngineReader)
    for part in (9, 1, 1, 3, 1):
        ids = tokens(part, seed=part).tolist()
        torch.testing.assert_close(fast.read(ids), plain.read(ids), rtol=1e-9, atol=1e-10)
    # and from the state of the other
    other = fast_reader(model)
    other.state = plain.state
    plain.state = fast.state
    for _ in range(8):
        wanted = plain.read([3])
        torch.testing.assert_close(other.read([3]), wanted, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(fast.read([3]), wanted, rtol=1e-9, atol=1e-10)


def test_a_model_that_keeps_all_tokens_reads_with_its_forward_pass():
    assert isinstance(fast_reader(make_model(config_of("full-attention"))), PlainReader)
