from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hgrn2.data.sequential import sequential_windows

EOT = 256


def histories(windows):
    """Run a model whose state is all inputs it has seen; give (history, target) of every target."""
    carried: list[tuple[int, ...]] = [()] * windows.num_streams
    found, num_text_bytes = [], 0
    for batch in windows:
        flat, targets = batch.input_ids[0].tolist(), batch.targets[0].tolist()
        bounds = batch.cu_seqlens.tolist()
        finals = []
        for start, stop, source in zip(bounds, bounds[1:], batch.carry_from.tolist(), strict=False):
            history = carried[source] if source >= 0 else ()
            for token, target in zip(flat[start:stop], targets[start:stop], strict=True):
                history = (*history, token)
                if target != -100:
                    found.append((history, target))
            finals.append(history)
        carried = [finals[index] for index in batch.carry_to.tolist()]
        num_text_bytes += batch.num_text_bytes
    return found, num_text_bytes


def expected(documents):
    """Every token from all of its document before it, and the end of text after the last."""
    pairs = []
    for document in documents:
        tokens = (EOT, *document.encode())
        pairs += [(tokens[:i], tokens[i]) for i in range(1, len(tokens))] + [(tokens, EOT)]
    return pairs


@settings(max_examples=60)
@given(
    documents=st.lists(st.text(alphabet="abcé", min_size=1, max_size=30), min_size=1, max_size=8),
    seq_len=st.integers(1, 20),
    batch_size=st.integers(1, 5),
)
def test_every_token_once_with_its_whole_context(make_dataset, documents, seq_len, batch_size):
    dataset = make_dataset(documents, 13)
    windows = sequential_windows(dataset, seq_len, batch_size)
    found, num_text_bytes = histories(windows)
    assert sorted(found) == sorted(expected(documents))
    assert num_text_bytes == windows.num_text_bytes == dataset.num_text_bytes
    assert len(found) == windows.num_tokens == dataset.num_tokens
    assert len(windows) == len(list(windows))


@settings(max_examples=60)
@given(
    documents=st.lists(
        st.lists(st.text(alphabet="abcé", min_size=1, max_size=12), min_size=1, max_size=5),
        min_size=1,
        max_size=8,
    ),
    batch_size=st.integers(1, 4),
    max_tokens=st.integers(1, 200),
)
def test_bytes_are_exact_when_cut(make_dataset, documents, batch_size, max_tokens):
    dataset = make_dataset(documents)
    windows = sequential_windows(dataset, 7, batch_size, max_tokens)
    found, num_text_bytes = histories(windows)
    assert len(found) == windows.num_tokens
    # targets other than the ends of documents are exactly the bytes counted
    assert sum(target != EOT for _, target in found) == num_text_bytes == windows.num_text_bytes
    whole = ["".join(pieces) for pieces in documents]
    assert set(found) <= set(expected(whole))
    assert sum(target == EOT for _, target in found) >= windows.num_documents - 1
    smallest = min(len(pieces[0].encode()) for pieces in documents) + 1
    assert windows.num_tokens <= max(max_tokens, max(len("".join(d).encode()) + 1 for d in documents))
    assert windows.num_tokens >= min(smallest - 1, max_tokens)


def test_the_sample_is_always_the_same_and_from_all_over(make_dataset):
    dataset = make_dataset([chr(97 + i % 26) * 9 for i in range(200)])
    one, two = (histories(sequential_windows(dataset, 16, 4, 200))[0] for _ in range(2))
    assert one == two
    assert len(one) == 200
    scored = {history[1] for history, _ in one if len(history) > 1}
    assert len(scored) > 10


def test_a_long_document_is_cut_near_the_limit(make_dataset):
    dataset = make_dataset([["x" * 100] * 50])
    windows = sequential_windows(dataset, 64, 4, 1000)
    assert windows.num_text_bytes == 900
    assert windows.num_tokens == 900
    assert sum(int((batch.targets != -100).sum()) for batch in windows) == 900


def test_streams_are_balanced(make_dataset):
    rng = np.random.default_rng(0)
    dataset = make_dataset(["x" * int(n) for n in rng.integers(1, 500, 100)])
    batches = list(sequential_windows(dataset, 32, 4))
    assert all(len(batch.carry_to) == 4 for batch in batches)
    assert sum(batch.input_ids.shape[1] == 128 for batch in batches) >= len(batches) - 3


def test_fewer_documents_than_streams(make_dataset):
    found, num_text_bytes = histories(sequential_windows(make_dataset(["abc", "de"]), 2, 8))
    assert sorted(found) == sorted(expected(["abc", "de"]))
    assert num_text_bytes == pytest.approx(5)
