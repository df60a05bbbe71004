"""Every way to run a model gives the same logits and leaves a state from which the next tokens are the same.

The table `WAYS` holds for every mixer: a mixer has its cases in `tests.models.cases`.
"""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hgrn2.models import ModelState
from hgrn2.nn.mixers import mixer_names
from tests.models.cases import KINDS, NAMES, config_of, make_model, tokens
from tests.refusals import refuses

LENGTH, MORE = 20, 4
HYBRIDS = ["full-attention", "window-attention", "attention-without-positions"]
EVEN, RAGGED, UNEVEN = [LENGTH, LENGTH], [5, 0, 1, 11, 3, 0], [LENGTH, 6, 1, 13]


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


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def chunks(*sizes):
    def run(model, texts):
        logits, state = in_chunks(model, torch.stack(texts), sizes)
        return list(logits), state

    return run


def steps(model, texts):
    state, logits = model.init_state(len(texts)), []
    for ids in torch.stack(texts).unbind(1):
        y, state = model.step(ids, state)
        logits.append(y)
    return list(torch.stack(logits, 1)), state


def packed(model, texts):
    lengths = [len(text) for text in texts]
    logits, state = model(torch.cat(texts)[None], cu_seqlens=bounds_of(lengths))
    return list(logits[0].split(lengths)), state


def packed_in_windows(model, texts):
    """A third of each text, then half of the rest (of the first text, nothing), then what is left."""
    done, logits, state = [0] * len(texts), [[] for _ in texts], None
    for share in (3, 2, 1):
        lengths = [(len(text) - at) // share for text, at in zip(texts, done, strict=True)]
        if share == 2:
            lengths[0] = 0
        rows = [text[at : at + n] for text, at, n in zip(texts, done, lengths, strict=True)]
        y, state = model(torch.cat(rows)[None], state, cu_seqlens=bounds_of(lengths))
        for parts, part in zip(logits, y[0].split(lengths), strict=True):
            parts.append(part)
        done = [at + n for at, n in zip(done, lengths, strict=True)]
    return [torch.cat(parts) for parts in logits], state


def left_padded(*sizes, dtype=torch.bool):
    def run(model, texts):
        longest = max(map(len, texts))
        ids = torch.stack([torch.cat([tokens(longest - len(text), seed=5), text]) for text in texts])
        mask = torch.arange(longest) >= longest - torch.tensor([len(text) for text in texts])[:, None]
        logits, state = in_chunks(model, ids, sizes, mask=mask.to(dtype))
        return [y[longest - len(text) :] for y, text in zip(logits, texts, strict=True)], state

    return run


def padded_in_a_later_part(model, texts):
    """All read 1 token; then the rest, with padding before the shorter ones."""
    first, state = model(torch.stack([text[:1] for text in texts]))
    rest, state = left_padded(max(map(len, texts)) - 1)(_From(model, state), [text[1:] for text in texts])
    return [torch.cat(parts) for parts in zip(first, rest, strict=True)], state


class _From:
    """A model that goes on from a state."""

    def __init__(self, model, state):
        self.model, self.state = model, state

    def __call__(self, ids, state=None, **settings):
        return self.model(ids, self.state if state is None else state, **settings)


def saved_and_read(model, texts):
    ids = torch.stack(texts)
    first, state = model(ids[:, :7])
    state = ModelState.from_tensors(state.tensors()).check(model.state_spec(), len(texts))
    rest, state = model(ids[:, 7:], state)
    return list(torch.cat([first, rest], 1)), state


def chosen(model, texts):
    """The rows change places between two parts, beside one that starts afresh and is dropped."""
    ids = torch.stack(texts)
    first, state = model(ids[:, :7])
    order = torch.arange(len(texts)).flip(0)
    state = state.select(torch.cat([torch.tensor([-1]), order]))
    rest, state = model(torch.cat([ids[:1, 7:], ids[order, 7:]]), state)
    return list(torch.cat([first, rest[1:].flip(0)], 1)), state.select(1 + order)


# a way, and the lengths of the texts it reads
WAYS = {
    "whole": (chunks(LENGTH), EVEN),
    "in three chunks": (chunks(1, 2, 17), EVEN),
    "in even chunks": (chunks(7, 7, 6), EVEN),
    "in chunks of one": (chunks(*[1] * LENGTH), EVEN),
    "in chunks, some empty": (chunks(0, 3, 0, 17, 0), EVEN),
    "in steps": (steps, EVEN),
    "packed": (packed, RAGGED),
    "packed in windows": (packed_in_windows, [11, 10, 15, 12, 1]),
    "left-padded": (left_padded(LENGTH), UNEVEN),
    "left-padded by numbers": (left_padded(8, 12, dtype=torch.int64), UNEVEN),
    "left-padded in chunks": (left_padded(3, 1, 16), UNEVEN),
    "padded in a later part": (padded_in_a_later_part, UNEVEN),
    "saved and read": (saved_and_read, EVEN),
    "chosen": (chosen, EVEN),
}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


# every mixer, and what has a state of its own; the others differ from these in what no way of running touches
IN_THE_FAST_TIER = {
    "fla", "short-conv", "short-conv-2-bias", "clamp", "full-attention", "window-attention",
    "attention-without-positions", "average", "average-hybrid", "official-lra",
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_THE_FAST_TIER else pytest.mark.slow) for name in NAMES]
)
def test_every_way_agrees_with_each_text_alone(name, way):
    model = make_model(config_of(name))
    run, lengths = WAYS[way]
    texts = list(tokens(sum(lengths)).split(lengths))
    more = tokens(len(texts), MORE, seed=2)
    wanted = [model(torch.cat(pair)[None])[0][0] for pair in zip(texts, more, strict=True)]
    logits, state = run(model, texts)
    for found, alone, length in zip(logits, wanted, lengths, strict=True):
        assert_same(found, alone[:length])
    assert_goes_on(model, state, more, torch.stack([alone[-MORE:] for alone in wanted]))


def test_every_mixer_is_in_the_table():
    covered = {mixer for name in NAMES for mixer in config_of(name).layer_mixers}
    assert covered >= set(mixer_names())


@pytest.mark.parametrize("name", KINDS)
def test_a_mixer_says_alike_what_its_state_holds(name):
    config = config_of(name)
    for memory, specs in zip(config.layer_memories, make_model(config).state_spec(), strict=True):
        growing = [spec for spec in specs.values() if spec.grows]
        assert bool(growing) == (memory != "state")
        assert all((spec.limit is not None) == (memory == "window") for spec in growing)


def test_packed_streams_change_places():
    """One starts afresh and one is done, as streams do between windows."""
    for name in KINDS:
        model = make_model(config_of(name))
        ids = tokens(4, 30)
        wanted, _ = model(ids)
        done = [11, 10, 15, 12]
        rows = torch.cat([ids[i, :n] for i, n in enumerate(done)])
        _, state = model(rows[None], cu_seqlens=bounds_of(done))
        state = state.select(torch.tensor([3, -1, 0, 1]))
        lengths = [3, 4, 0, 2]
        rows = [ids[3, 12:15], ids[1, :4], ids[0, :0], ids[1, 10:12]]
        logits, _ = model(torch.cat(rows)[None], state, cu_seqlens=bounds_of(lengths))
        assert_same(logits[0], torch.cat([wanted[3, 12:15], wanted[1, :4], wanted[1, 10:12]]))


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
def test_a_state_may_be_taken_twice_or_not_at_all(name):
    model = make_model(config_of(name))
    ids = tokens(3, 12)
    wanted, _ = model(ids)
    _, state = model(ids[:, :7])
    order = torch.tensor([2, 0, 0])
    logits, _ = model(ids[order, 7:], state.select(order))
    assert_same(logits, wanted[order, 7:])
    fresh, _ = model(ids[[1, 2], :5], state.select(torch.tensor([-1, -1])))
    assert_same(fresh, wanted[[1, 2], :5])


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


class _NoValues(TorchDispatchMode):
    """Refuses to read a tensor's value, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "a value was read"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", KINDS)
def test_states_are_chosen_without_a_look_at_values(name):
    _, state = make_model(config_of(name))(tokens(3, 7))
    with _NoValues():
        state.select(torch.tensor([1, -1, 0]))
        state.select(torch.tensor([1, 2, 0]))
    with _NoValues(), pytest.raises(AssertionError):
        bool(torch.ones(1).any())


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
    with refuses("invalid-value", "input_ids", "[5]"):
        model(tokens(5))
    with refuses("invalid-value", "input_ids", "torch.float32"):
        model(torch.zeros(1, 3))
    with refuses("contradiction", "attention_mask", "cu_seqlens"):
        model(tokens(1, 3), cu_seqlens=torch.tensor([0, 3]), attention_mask=torch.ones(1, 3))
    with refuses("invalid-value", "attention_mask", "[1, 2]", "[1, 3]"):
        model(tokens(1, 3), attention_mask=torch.ones(1, 2))
