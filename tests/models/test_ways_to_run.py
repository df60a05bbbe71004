"""Every way to run the model gives the same logits and leaves a state from which the next tokens are the same."""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hgrn2.errors import UserError
from hgrn2.models import ModelState
from tests.models.cases import NAMES, config_of, make_model, tokens
from tests.refusals import refuses

LENGTH, MORE = 20, 4
HYBRIDS = ["full-attention", "window-attention", "attention-without-positions"]
# the variants whose state differs in kind
KINDS = ["fla", "official-lra", "short-conv", "short-conv-2-bias", *HYBRIDS]


def assert_same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def assert_goes_on(model, state, ids, wanted):
    """Steps through the columns of ids."""
    for t in range(ids.shape[1]):
        logits, state = model.step(ids[:, t], state)
        assert_same(logits, wanted[:, t])


def in_chunks(model, ids, sizes, state=None, mask=None):
    pieces, masks = ids.split(sizes, 1), [None] * len(sizes) if mask is None else mask.split(sizes, 1)
    logits = []
    for piece, part in zip(pieces, masks, strict=True):
        y, state = model(piece, state, attention_mask=part)
        logits.append(y)
    return torch.cat(logits, 1), state


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", NAMES)
def test_whole_in_chunks_in_steps(name):
    model = make_model(config_of(name))
    ids = tokens(2, LENGTH + MORE)
    wanted, _ = model(ids)
    head, tail = ids[:, :LENGTH], ids[:, LENGTH:]
    for sizes in ([LENGTH], [1, 2, 17], [7, 7, 6], [1] * LENGTH, [0, 3, 0, 17, 0]):
        logits, state = in_chunks(model, head, sizes)
        assert_same(logits, wanted[:, :LENGTH])
        assert_goes_on(model, state, tail, wanted[:, LENGTH:])
    assert_goes_on(model, model.init_state(2), ids, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_packed_is_separate(name):
    model = make_model(config_of(name))
    lengths = [5, 0, 1, 11, 3, 0]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    ids, more = tokens(1, sum(lengths)), tokens(len(lengths), MORE, seed=2)
    packed, state = model(ids, cu_seqlens=bounds)
    alone = [model(torch.cat([x, y[None]], 1))[0] for x, y in zip(ids.split(lengths, 1), more, strict=True)]
    assert_same(packed, torch.cat([x[:, :length] for x, length in zip(alone, lengths, strict=True)], 1))
    assert_goes_on(model, state, more, torch.cat([x[:, -MORE:] for x in alone]))


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_go_on_from_states(name):
    model = make_model(config_of(name))
    parts = [[5, 2, 4, 0], [3, 6, 0, 8], [1, 0, 9, 2], [2, 2, 2, 2]]
    ids = tokens(4, 30)
    wanted, _ = model(ids)
    done, state = [0] * 4, None
    for lengths in parts:
        rows = [ids[i : i + 1, done[i] : done[i] + n] for i, n in enumerate(lengths)]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        packed, state = model(torch.cat(rows, 1), state, cu_seqlens=bounds)
        aims = [wanted[i : i + 1, done[i] : done[i] + n] for i, n in enumerate(lengths)]
        assert_same(packed, torch.cat(aims, 1))
        done = [a + b for a, b in zip(done, lengths, strict=True)]
    # sequences change places, one starts afresh, as streams do between windows
    order = torch.tensor([3, -1, 0, 1])
    state = state.select(order)
    lengths = [3, 4, 0, 2]
    rows = [ids[i : i + 1, at : at + n] for i, at, n in ((3, done[3], 3), (1, 0, 4), (0, 0, 0), (1, done[1], 2))]
    packed, _ = model(torch.cat(rows, 1), state, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    aims = [wanted[3, done[3] : done[3] + 3], wanted[1, :4], wanted[1, done[1] : done[1] + 2]]
    assert_same(packed[0], torch.cat(aims))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("name", NAMES)
def test_left_padded_is_separate(name, mask_dtype):
    model = make_model(config_of(name))
    lengths = [LENGTH, 6, 1, 13]
    ids, more = tokens(4, LENGTH), tokens(4, MORE, seed=2)
    mask = torch.arange(LENGTH) >= LENGTH - torch.tensor(lengths)[:, None]
    alone = [model(torch.cat([ids[i, LENGTH - n :], more[i]])[None])[0] for i, n in enumerate(lengths)]
    after = torch.cat([x[:, -MORE:] for x in alone])
    for sizes in ([LENGTH], [8, 12], [3, 1, 16]):
        logits, state = in_chunks(model, ids, sizes, mask=mask.to(mask_dtype))
        for i, n in enumerate(lengths):
            assert_same(logits[i, LENGTH - n :], alone[i][0, :n])
        assert_goes_on(model, state, more, after)


@pytest.mark.parametrize("name", KINDS)
def test_padding_before_a_later_part(name):
    model = make_model(config_of(name))
    ids = tokens(2, LENGTH + MORE)
    wanted, _ = model(ids)
    # the second sequence reads 4 tokens fewer in its second part, and has padding there
    _, state = model(ids[:, :8])
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :4] = False
    part = torch.stack([ids[0, 8:20], torch.cat([torch.zeros(4, dtype=torch.long), ids[1, 8:16]])])
    logits, state = model(part, state, attention_mask=mask)
    assert_same(logits[0], wanted[0, 8:20])
    assert_same(logits[1, 4:], wanted[1, 8:16])
    assert_goes_on(
        model, state, torch.stack([ids[0, 20:], ids[1, 16:20]]), torch.stack([wanted[0, 20:], wanted[1, 16:20]])
    )


@pytest.mark.parametrize("name", KINDS)
def test_what_padding_holds_does_not_matter(name):
    model = make_model(config_of(name))
    ids = tokens(2, 9)
    mask = torch.arange(9) >= torch.tensor([[4], [0]])
    other = torch.where(mask, ids, (ids + 1) % 29)
    one, two = model(ids, attention_mask=mask), model(other, attention_mask=mask)
    assert torch.equal(one[0][mask], two[0][mask])
    for name, x in one[1].tensors().items():
        if name.endswith((".key", ".value")):
            continue
        assert torch.equal(x, two[1].tensors()[name]), name


@pytest.mark.parametrize("name", KINDS)
def test_states_can_be_chosen(name):
    model = make_model(config_of(name))
    ids = tokens(3, 12)
    wanted, _ = model(ids)
    _, state = model(ids[:, :7])
    order = torch.tensor([2, 0, 0])
    logits, _ = model(ids[order, 7:], state.select(order))
    assert_same(logits, wanted[order, 7:])
    fresh, _ = model(ids[[1, 2], :5], state.select(torch.tensor([-1, -1])))
    assert_same(fresh, wanted[[1, 2], :5])
    mixed, _ = model(torch.stack([ids[1, 7:], ids[0, :5]]), state.select(torch.tensor([1, -1])))
    assert_same(mixed, torch.stack([wanted[1, 7:], wanted[0, :5]]))


@pytest.mark.parametrize("name", KINDS)
def test_states_travel_as_named_tensors(name):
    model = make_model(config_of(name), torch.float32)
    _, state = model(tokens(2, 7))
    tensors = state.tensors()
    assert all(x.is_contiguous() for x in tensors.values())
    assert state.num_bytes == sum(x.nbytes for x in tensors.values())
    back = ModelState.from_tensors(tensors).check(model.state_spec(), 2)
    one, two = model(tokens(2, 5), state)[0], model(tokens(2, 5), back)[0]
    assert torch.equal(one, two)


def test_a_state_of_another_model_is_refused():
    models = {name: make_model(config_of(name)) for name in ("fla", "short-conv", "full-attention", "one-head")}
    states = {name: model.init_state(1) for name, model in models.items()}
    with refuses("mismatch", 3, 12):
        states["fla"].check(models["short-conv"].state_spec(), 1)
    with refuses("mismatch"):
        states["fla"].check(models["full-attention"].state_spec(), 1)
    with refuses("mismatch", "layers.0.recurrent", [1, 1, 16, 16], [1, 4, 4, 4]):
        states["one-head"].check(models["fla"].state_spec(), 1)
    with refuses("mismatch", [2, 4, 4, 4], [1, 4, 4, 4]):
        states["fla"].select(torch.tensor([0, 0])).check(models["fla"].state_spec(), 1)
    more_heads = config_of("full-attention").replace(attn={"layers": [1], "num_heads": 4, "num_kv_heads": 4})
    with refuses("mismatch", "layers.1.key"):
        make_model(more_heads).init_state(1).check(models["full-attention"].state_spec(), 1)


def test_caches_of_windows_stay_small():
    model = make_model(config_of("window-attention"))
    state = None
    for _ in range(6):
        _, state = model(tokens(2, 7), state)
    for _ in range(3):
        _, state = model(tokens(1, 20), state, cu_seqlens=torch.tensor([0, 3, 20]))
    assert state.layers[0]["key"].shape[1] == 4
    assert state.layers[0]["position"].tolist() == [51, 93]


def test_caches_of_streams_hold_what_the_longest_needs():
    model = make_model(config_of("full-attention"))
    state = None
    for _ in range(5):
        _, state = model(tokens(1, 16), state, cu_seqlens=torch.tensor([0, 10, 16]))
        # the first stream starts a new document every time
        state = state.select(torch.tensor([-1, 1]))
    assert state.layers[1]["valid"].sum(1).tolist() == [0, 30]
    assert state.layers[1]["key"].shape[1] <= 40


@pytest.mark.parametrize("name", KINDS)
def test_a_state_that_is_not_wanted_is_not_built(name):
    model = make_model(config_of(name))
    ids = tokens(1, 12)
    bounds = torch.tensor([0, 5, 12])
    state = model.init_state(2)
    for settings in ({}, {"cu_seqlens": bounds}, {"cu_seqlens": bounds, "state": state}):
        wanted, _, kept = model.loss(ids, ids, **settings)
        found, _, none = model.loss(ids, ids, **settings, keep_state=False)
        assert torch.equal(found, wanted)
        assert kept.tensors()
        assert not none.tensors()


class _Largest(TorchDispatchMode):
    """Numbers of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, list | tuple) else [out]
        self.numel = max([self.numel, *(x.numel() for x in made if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("keep_state", [False, True])
def test_packed_attention_needs_memory_by_the_sequence(name, keep_state):
    model = make_model(config_of(name), torch.float32)
    length, num_sequences = 2048, 64
    bounds = torch.arange(num_sequences + 1) * (length // num_sequences)
    for state in (None, model.init_state(num_sequences)):
        with _Largest() as made:
            model.hidden_states(tokens(1, length), state, bounds, keep_state=keep_state)
        assert made.numel <= length * 64


def test_a_long_sequence_in_a_window_needs_memory_by_the_token():
    model = make_model(config_of("window-attention"), torch.float32)
    with _Largest() as made:
        model.hidden_states(tokens(1, 2048))
    assert made.numel <= 2048 * 300


@pytest.mark.parametrize("length", [300, 600])
def test_windows_in_several_blocks(length):
    model = make_model(config_of("window-attention"))
    ids = tokens(2, length)
    wanted, _ = in_chunks(model, ids, [50] * (length // 50))
    assert_same(model(ids)[0], wanted)
    packed, state = model(ids.view(1, -1), cu_seqlens=torch.tensor([0, length, 2 * length]))
    assert_same(packed.view(2, length, -1), wanted)
    # and with a cache before each
    more = tokens(2, length, seed=5)
    wanted, _ = model(torch.cat([ids, more], 1))
    packed, _ = model(more.view(1, -1), state, cu_seqlens=torch.tensor([0, length, 2 * length]))
    assert_same(packed.view(2, length, -1), wanted[:, length:])


@pytest.mark.parametrize("name", KINDS)
def test_gradients_flow_through_a_state(name):
    model = make_model(config_of(name))
    ids = tokens(1, 12)
    with torch.enable_grad():
        _, state = model(ids[:, :6])
        carried = model(ids[:, 6:], state)[0].square().sum()
        whole = model(ids)[0][:, 6:].square().sum()
        names = [n for n, _ in model.named_parameters()]
        found = torch.autograd.grad(carried, list(model.parameters()))
        wanted = torch.autograd.grad(whole, list(model.parameters()))
    for n, one, two in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9, msg=n)
    assert not any(x.requires_grad for x in state.detach().tensors().values())


def test_mistakes_are_named():
    model = make_model(config_of("fla"))
    with pytest.raises(UserError, match=r"tensor \[5\] .* wanted a tensor \[B, T\]"):
        model(tokens(5))
    with pytest.raises(UserError, match="int64"):
        model(torch.zeros(1, 3))
    with pytest.raises(UserError, match="drop the mask"):
        model(tokens(1, 3), cu_seqlens=torch.tensor([0, 3]), attention_mask=torch.ones(1, 3))
    with pytest.raises(UserError, match=r"attention_mask is a tensor \[1, 2\] .*; wanted a tensor \[1, 3\]"):
        model(tokens(1, 3), attention_mask=torch.ones(1, 2))
