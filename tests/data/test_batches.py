from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hgrn2.data.batches import Batch, PackedBatches, StreamBatches
from tests.refusals import refuses

EOT = 256
FIELDS = ("input_ids", "targets", "cu_seqlens", "state_reset", "carry_from", "carry_to")


def numbered(make_dataset, lengths):
    """Documents of given lengths, whose neighbouring tokens differ."""
    letters = iter(range(200))
    return make_dataset(["".join(chr(next(letters) % 128) for _ in range(length)) for length in lengths], 17)


def same(one, two):
    pairs = [(getattr(one, name), getattr(two, name)) for name in FIELDS]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


def circle(dataset):
    """The token after each position, with the end tied to the start."""
    tokens = dataset.tokens(0, dataset.num_tokens)
    return tokens, np.roll(tokens, -1)


# ten tokens or more, enough for a window of nine
document_lengths = st.lists(st.integers(1, 12), min_size=1, max_size=8).map(lambda lengths: [8, *lengths])


@settings(max_examples=60)
@given(lengths=document_lengths, seq_len=st.integers(1, 9), seed=st.integers(0, 3), plain=st.booleans())
def test_every_token_is_a_target_once_an_epoch(make_dataset, lengths, seq_len, seed, plain):
    dataset = numbered(make_dataset, lengths)
    tokens, following = circle(dataset)
    pairs = sorted(zip(tokens.tolist(), following.tolist(), strict=True))
    batches = PackedBatches(dataset, 1, seq_len, seed, reset_at_documents=not plain)
    for _ in range(2):
        seen = []
        for _ in range(batches.num_windows):
            batch = next(batches)
            inputs, targets = batch.input_ids.flatten(), batch.targets.flatten()
            seen += [(int(i), int(t)) for i, t in zip(inputs, targets, strict=True) if t != -100]
        assert sorted(seen) == pairs
    assert batches.epoch == 2.0


@settings(max_examples=60)
@given(
    lengths=document_lengths,
    seq_len=st.integers(1, 9),
    batch_size=st.integers(1, 6),
    position=st.integers(0, 50),
)
def test_packed_batches_are_cut_at_windows_and_documents(make_dataset, lengths, seq_len, batch_size, position):
    dataset = numbered(make_dataset, lengths)
    batch = PackedBatches(dataset, batch_size, seq_len).batch_at(position)
    assert batch.input_ids.shape == batch.targets.shape == (1, batch_size * seq_len)
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.dtype == torch.int32
    flat = batch.input_ids[0]
    starts = {i for i in range(len(flat)) if i % seq_len == 0 or flat[i] == EOT}
    assert batch.cu_seqlens.tolist() == [*sorted(starts), len(flat)]
    plain = PackedBatches(dataset, batch_size, seq_len, reset_at_documents=False).batch_at(position)
    assert plain.cu_seqlens is None
    assert torch.equal(plain.input_ids, flat.view(batch_size, seq_len))
    # windows are stretches of the circle
    tokens, following = circle(dataset)
    for inputs, targets in zip(plain.input_ids.numpy(), plain.targets.numpy(), strict=True):
        found = any(
            np.array_equal(np.roll(tokens, -i)[np.arange(seq_len) % len(tokens)], inputs)
            and ((np.roll(following, -i)[np.arange(seq_len) % len(tokens)] == targets) | (targets == -100)).all()
            for i in range(len(tokens))
        )
        assert found


@settings(max_examples=40)
@given(lengths=document_lengths, seq_len=st.integers(1, 9), world_size=st.sampled_from([1, 2, 3, 6]))
@pytest.mark.parametrize("kind", [PackedBatches, StreamBatches])
def test_global_batches_do_not_depend_on_the_number_of_ranks(make_dataset, kind, lengths, seq_len, world_size):
    dataset = numbered(make_dataset, [5, *lengths] if kind is PackedBatches else [60, *lengths])
    whole = kind(dataset, 6, seq_len, reset_at_documents=False)
    ranks = [
        kind(dataset, 6 // world_size, seq_len, rank=rank, world_size=world_size, reset_at_documents=False)
        for rank in range(world_size)
    ]
    for _ in range(4):
        together, parts = next(whole), [next(batches) for batches in ranks]
        assert torch.equal(together.input_ids, torch.cat([part.input_ids for part in parts]))
        assert torch.equal(together.targets, torch.cat([part.targets for part in parts]))
    assert {batches.position for batches in ranks} == {whole.position}


@pytest.mark.parametrize("kind", [PackedBatches, StreamBatches])
@pytest.mark.parametrize("stop", [0, 1, 13, 100])
def test_restored_in_the_middle_is_as_uninterrupted(make_dataset, kind, stop):
    dataset = numbered(make_dataset, [30, 3, 25, 40, 1])
    uninterrupted = kind(dataset, 3, 8, seed=5)
    expected = [next(uninterrupted) for _ in range(stop + 5)]
    first = kind(dataset, 3, 8, seed=5)
    assert all(same(next(first), expected[i]) for i in range(stop))
    saved = first.state_dict()
    assert saved["position"] == expected_position(uninterrupted, stop)
    second = kind(dataset, 3, 8, seed=5)
    next(second)
    second.load_state_dict(saved)
    assert all(same(next(second), batch) for batch in expected[stop:])
    assert second.epoch == uninterrupted.epoch


def expected_position(batches, num_batches):
    return num_batches * batches.step_size


def test_packed_position_moves_to_another_number_of_ranks(make_dataset):
    dataset = numbered(make_dataset, [30, 3, 25])
    one = PackedBatches(dataset, 4, 8)
    next(one)
    two = PackedBatches(dataset, 2, 8, rank=1, world_size=2)
    two.load_state_dict(one.state_dict())
    assert torch.equal(next(two).input_ids, next(one).input_ids[:, 16:])


def test_epochs_and_seeds_differ(make_dataset):
    dataset = numbered(make_dataset, [30, 30, 30])
    batches = PackedBatches(dataset, 1, 8)
    first, second = ([next(batches) for _ in range(batches.num_windows)] for _ in range(2))
    assert not all(same(a, b) for a, b in zip(first, second, strict=True))
    assert not same(PackedBatches(dataset, 8, 8, seed=1).batch_at(0), PackedBatches(dataset, 8, 8).batch_at(0))


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=7),
    seq_len=st.integers(1, 9),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_streams_cover_an_epoch_and_carry_state_within_documents_only(make_dataset, lengths, seq_len, batch_size, seed):
    dataset = numbered(make_dataset, [40, *lengths])
    tokens, following = circle(dataset)
    batches = StreamBatches(dataset, batch_size, seq_len, seed)
    for _ in range(2):
        seen, carried, histories = [], [[] for _ in range(batch_size)], []
        for window in range(batches.num_windows):
            batch = next(batches)
            assert batch.state_reset.tolist() == [window == 0] * batch_size
            carried, pairs, done = follow(batch, carried)
            seen += pairs
            histories += done
        assert sorted(seen) == sorted(zip(tokens.tolist(), following.tolist(), strict=True))
        # what a model has seen in its state is an unbroken stretch of one document
        for history in histories:
            assert EOT not in history[1:]
            assert not history or "".join(map(chr, history)).lstrip(chr(EOT)) in documents(tokens)


def documents(tokens):
    return " \n ".join("".join(map(chr, part)) for part in np.split(tokens, np.flatnonzero(tokens == EOT)))


def follow(batch, carried):
    """Run a model whose state is all inputs it has seen: new states, (input, target) pairs, final states."""
    finals, pairs = [], []
    flat, targets = batch.input_ids[0].tolist(), batch.targets[0].tolist()
    bounds = batch.cu_seqlens.tolist()
    assert bounds[-1] == len(flat)
    assert len(batch.carry_from) == len(bounds) - 1
    for start, stop, source in zip(bounds, bounds[1:], batch.carry_from.tolist(), strict=False):
        history = list(carried[source]) if source >= 0 else []
        for token, target in zip(flat[start:stop], targets[start:stop], strict=True):
            if target != -100:
                pairs.append((token, target))
                history.append(token)
        finals.append(history)
    return [finals[index] for index in batch.carry_to.tolist()], pairs, finals


def test_stream_continues_over_windows(make_dataset):
    dataset = make_dataset(["abcdefgh", "ij", "klmnopqrstuv"])
    batches = StreamBatches(dataset, 1, 4)
    num_tokens = dataset.num_tokens
    carried, longest = [[]], 0
    for _ in range(batches.num_windows):
        carried, _, finals = follow(next(batches), carried)
        longest = max(longest, *map(len, finals))
    # the longest document, but for the place where the epoch starts
    assert longest >= 9
    assert num_tokens == 25


@pytest.mark.parametrize("kind", [PackedBatches, StreamBatches])
def test_plain_batches(make_dataset, kind):
    dataset = numbered(make_dataset, [30, 30])
    batch = next(kind(dataset, 2, 8, reset_at_documents=False))
    assert batch.input_ids.shape == (2, 8)
    assert batch.cu_seqlens is None
    assert batch.carry_from is None
    assert (batch.state_reset is None) == (kind is PackedBatches)
    moved = batch.to("meta")
    assert moved.targets.device.type == "meta"


def test_too_little_data(make_dataset):
    dataset = make_dataset(["abcdefg"])
    assert dataset.num_tokens == 8
    next(PackedBatches(dataset, 4, 7))
    with refuses("contradiction", dataset.directory, 8, 9, "seq_len"):
        PackedBatches(dataset, 4, 8)
    next(StreamBatches(dataset, 2, 4))
    with refuses("contradiction", dataset.directory, 8, 9, "3 streams"):
        StreamBatches(dataset, 1, 3, world_size=3)


@pytest.mark.parametrize("kind", [PackedBatches, StreamBatches])
def test_bad_settings(make_dataset, kind):
    dataset = numbered(make_dataset, [30, 30])
    with refuses("invalid-value", "batch_size", "seq_len"):
        kind(dataset, 0, 8)
    with refuses("invalid-value", "batch_size", "seq_len"):
        kind(dataset, 1, 0)
    with pytest.raises(ValueError, match="rank 2 is outside"):
        kind(dataset, 1, 8, rank=2, world_size=2)


@pytest.mark.parametrize("kind", [PackedBatches, StreamBatches])
def test_positions_of_something_else_are_refused(make_dataset, kind):
    dataset = numbered(make_dataset, [30, 30])
    saved = kind(dataset, 2, 8).state_dict()
    for other, name in [
        (kind(dataset, 2, 8, seed=1), "seed"),
        (kind(dataset, 2, 7), "seq_len"),
        (kind(numbered(make_dataset, [30, 31]), 2, 8), "data"),
    ]:
        with refuses("mismatch", name):
            other.load_state_dict(saved)


def test_stream_positions_need_the_same_streams(make_dataset):
    dataset = numbered(make_dataset, [30, 30])
    saved = StreamBatches(dataset, 2, 8).state_dict()
    with refuses("mismatch", "num_streams", 2, 3):
        StreamBatches(dataset, 3, 8).load_state_dict(saved)
    # a position among streams is none among samples, and the other way round
    with refuses("mismatch", "num_streams", 2, None):
        PackedBatches(dataset, 2, 8).load_state_dict(saved)
    with refuses("mismatch", "num_streams", None, 2):
        StreamBatches(dataset, 2, 8).load_state_dict(PackedBatches(dataset, 2, 8).state_dict())
    StreamBatches(dataset, 1, 8, world_size=2).load_state_dict(StreamBatches(dataset, 2, 8).state_dict())


def test_padded_sequences_are_empty_and_come_last():
    batch = Batch(torch.zeros(1, 10, dtype=torch.long), torch.zeros(1, 10, dtype=torch.long), torch.tensor([0, 4, 10]))
    assert batch.pad_sequences().cu_seqlens.tolist() == [0, 4, 10, 10, 10, 10, 10, 10, 10]
    many = Batch(batch.input_ids, batch.targets, torch.arange(11))
    assert len(many.pad_sequences().cu_seqlens) == 17
    assert len(many.pad_sequences().pad_sequences().cu_seqlens) == 17
