"""The transformers classes compute what our model computes."""

import copy

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DummyLayer

from hgrn2.hf import HGRN2Config, HGRN2ForCausalLM, HGRN2ForSequenceClassification
from hgrn2.hf.cache import CACHE_NAME
from hgrn2.models import HGRN2LM
from tests.hf.cases import KINDS, both, hf_config, left_padded, tokens
from tests.models.cases import NAMES, config_of
from tests.refusals import refuses


def assert_same(found, wanted, tolerance=1e-12):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_have_our_names_and_shapes(name):
    own, model = both(name)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in own.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_are_those_of_our_model(name, dtype, tolerance):
    own, model = both(name, dtype)
    ids, mask = left_padded([9, 4])
    assert_same(model(ids).logits, own(ids)[0], tolerance)
    wanted = own(ids, attention_mask=mask)[0]
    assert_same(model(ids, attention_mask=mask).logits[mask.bool()], wanted[mask.bool()], tolerance)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_batched_texts_are_as_if_alone(name):
    _, model = both(name)
    lengths = [11, 1, 6]
    ids, mask = left_padded(lengths)
    together = model(ids, attention_mask=mask).logits
    for i, n in enumerate(lengths):
        assert_same(together[i, -n:], model(ids[i : i + 1, -n:]).logits[0])
    # padding on the right changes nothing before it either
    right = torch.stack([row.roll(n) for row, n in zip(ids, lengths, strict=True)])
    right_mask = (torch.arange(11) < torch.tensor(lengths)[:, None]).long()
    again = model(right, attention_mask=right_mask).logits
    for i, n in enumerate(lengths):
        assert_same(again[i, :n], together[i, -n:])


@torch.no_grad()
def test_places_that_say_nothing_new_are_taken():
    _, model = both("full-attention")
    ids, mask = left_padded([5, 3])
    wanted = model(ids, attention_mask=mask).logits
    # padding has had different places in the course of time
    for padding in (0, 1):
        places = (mask.cumsum(1) - 1).masked_fill(mask == 0, padding)
        assert torch.equal(model(ids, attention_mask=mask, position_ids=places).logits, wanted)
    assert torch.equal(model(ids, position_ids=torch.arange(7, 12)[None]).logits, model(ids).logits)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_text_in_parts_is_the_text(name):
    own, model = both(name)
    ids = tokens(2, 20)
    wanted = own(ids)[0]
    for sizes in ([20], [1, 2, 17], [7, 7, 6], [1] * 20):
        cache, logits = None, []
        for part in ids.split(sizes, 1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out[CACHE_NAME]
            logits.append(out.logits)
        assert_same(torch.cat(logits, 1), wanted)
        assert cache.get_seq_length() == 20
        assert cache.layers[0].batch_size == 2


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_part_may_be_padded_in_the_middle(name):
    # the second row reads four tokens fewer in its second part
    own, model = both(name)
    ids = tokens(2, 16)
    wanted = own(ids)[0]
    mask = torch.ones(2, 16)
    mask[1, 8:12] = 0
    first = model(ids[:, :8], use_cache=True)
    second = torch.stack([ids[0, 8:], torch.cat([torch.zeros(4, dtype=torch.long), ids[1, 8:12]])])
    for given in (mask, mask[:, 8:]):
        out = model(second, attention_mask=given, past_key_values=copy.deepcopy(first[CACHE_NAME]))
        assert_same(out.logits[0], wanted[0, 8:])
        assert_same(out.logits[1, 4:], wanted[1, 8:12])


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_caches_of_the_library_are_taken(name):
    own, model = both(name)
    ids = tokens(1, 7)
    static = [StaticCache(config=model.config, max_cache_len=n) for n in (7, 30)]
    for cache in (DynamicCache(), DynamicCache(config=model.config), *static):
        model(ids[:, :4], past_key_values=cache)
        assert_same(model(ids[:, 4:], past_key_values=cache).logits, own(ids)[0][:, 4:])
        assert cache.get_seq_length() == 7
        cache.reset()
        assert cache.get_seq_length() == 0
        assert_same(model(ids, past_key_values=cache).logits, own(ids)[0])


@torch.no_grad()
def test_other_caches_are_refused():
    ids = tokens(1, 7)
    _, hybrid = both("full-attention")
    _, model = both("fla")
    shared = DynamicCache(config=hybrid.config)
    shared.layers[1] = DummyLayer()
    with refuses("unsupported", "layer 1", "DummyLayer"):
        hybrid(ids, past_key_values=shared)
    small = StaticCache(config=hybrid.config, max_cache_len=9)
    hybrid(ids, past_key_values=small)
    with refuses("invalid-value", "cache", "9", "10"):
        hybrid(ids[:, :3], past_key_values=small)
    used = model(ids, use_cache=True)[CACHE_NAME]
    with refuses("mismatch", "layer 1", "linear_attention", "full_attention"):
        hybrid(ids, past_key_values=used)
    with refuses("mismatch", "1 sequence", "2"):
        model(tokens(2, 3), past_key_values=used)
    with refuses("mismatch", "3 layers", "2"):
        HGRN2ForCausalLM(hf_config("fla", num_hidden_layers=2)).eval()(ids, past_key_values=used)
    filled = DynamicCache(config=hybrid.config)
    filled.layers[1].update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    with refuses("mismatch", "layer 1"):
        hybrid(ids, past_key_values=filled)
    with refuses("unsupported", "2 tokens"):
        used.crop(-2)
    assert not used.is_croppable


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_cached_sequences_are_chosen_and_repeated(name):
    own, model = both(name)
    ids = tokens(3, 12)
    cache = model(ids[:, :7], use_cache=True)[CACHE_NAME]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    rows = [2, 0, 0]
    wanted = own(ids[rows])[0][:, 7:]
    assert_same(model(ids[rows, 7:], past_key_values=cache).logits, wanted)
    cache = model(ids[:, :7], use_cache=True)[CACHE_NAME]
    cache.batch_select_indices(torch.tensor([1, 2]))
    cache.batch_repeat_interleave(2)
    rows = [1, 1, 2, 2]
    assert_same(model(ids[rows, 7:], past_key_values=cache).logits, own(ids[rows])[0][:, 7:])


@pytest.mark.parametrize("name", [*KINDS, "scale-embedding"])
@torch.no_grad()
def test_embeddings_instead_of_ids(name):
    _, model = both(name)
    ids = tokens(2, 9)
    embedded = model.get_input_embeddings()(ids)
    assert_same(model(inputs_embeds=embedded).logits, model(ids).logits)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_hidden_states(name):
    own, model = both(name)
    ids = tokens(2, 9)
    inputs = []
    handles = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in own.model.layers]
    last, _ = own.hidden_states(ids)
    for handle in handles:
        handle.remove()
    for out in (model(ids, output_hidden_states=True), model.model(ids, output_hidden_states=True)):
        assert len(out.hidden_states) == 4
        for found, wanted in zip(out.hidden_states, [*inputs, last], strict=True):
            assert_same(found, wanted)
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 4


@torch.no_grad()
def test_outputs_as_a_tuple():
    _, model = both("fla")
    ids = tokens(2, 9)
    logits, cache = model(ids, return_dict=False)
    assert_same(logits, model(ids).logits)
    assert cache.get_seq_length() == 9
    (alone,) = model(ids, return_dict=False, use_cache=False)
    assert_same(alone, logits)
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)


@pytest.mark.parametrize("keep", [1, 3, 0, torch.tensor([0, 4])])
@torch.no_grad()
def test_logits_to_keep(keep):
    _, model = both("fla")
    ids = tokens(2, 9)
    wanted = model(ids).logits
    wanted = wanted[:, keep] if isinstance(keep, torch.Tensor) else wanted[:, -keep:]
    out = model(ids, logits_to_keep=keep, labels=ids)
    assert_same(out.logits, wanted)
    assert_same(out.loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("name", ["fla", "tied"])
def test_loss_and_gradients(name):
    own, model = both(name)
    labels = tokens(2, 9)
    labels[0, :3] = -100
    ids = labels.clamp_min(0)
    out = model(ids, labels=labels)
    wanted = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_same(out.loss, wanted)
    targets = functional.pad(labels[:, 1:], (0, 1), value=-100)
    summed, count, _ = own.loss(ids, targets)
    assert count == 2 * 8 - 2
    assert_same(out.loss, summed / count)
    assert_same(model(ids, labels=labels, num_items_in_batch=torch.tensor(5)).loss, summed / 5)
    assert_same(model(ids, shift_labels=targets, num_items_in_batch=5).loss, summed / 5)
    # the Trainer gives both where it spreads a sequence over devices
    assert_same(model(ids, labels=ids, shift_labels=targets).loss, out.loss)
    out.loss.backward()
    (summed / count).backward()
    wanted_gradients = dict(own.named_parameters())
    for key, parameter in model.named_parameters():
        assert_same(parameter.grad, wanted_gradients[key].grad)


def test_a_head_that_is_more_than_a_matrix_is_called():
    _, model = both("fla")
    ids = tokens(2, 9)
    wanted = model(ids, labels=ids)

    class Twice(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    head = Twice(16, 29, bias=False).double()
    head.weight = torch.nn.Parameter(model.lm_head.weight / 2)
    model.set_output_embeddings(head)
    found = model(ids, labels=ids)
    assert_same(found.logits, wanted.logits)
    assert_same(found.loss, wanted.loss)


@pytest.mark.parametrize("packed", [False, True])
def test_a_loss_function_of_one_s_own_is_called(packed):
    _, model = both("fla")
    ids = tokens(1, 9)
    given = {"cu_seq_lens_q": torch.tensor([0, 4, 9])} if packed else {}
    wanted = model(ids, labels=ids, **given)
    calls = []

    def twice(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
        calls.append((tuple(logits.shape), vocab_size, num_items_in_batch, sorted(kwargs)))
        summed = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return 2 * summed / (num_items_in_batch or (labels[:, 1:] != -100).sum())

    model.loss_function = twice
    out = model(ids, labels=ids, logits_to_keep=1, **given)
    assert_same(out.loss, 2 * wanted.loss)
    assert_same(out.logits, wanted.logits[:, -1:])
    count = (9 - 1) - packed
    assert_same(model(ids, labels=ids, num_items_in_batch=2 * count, **given).loss, wanted.loss)
    assert calls == [((1, 9, 29), 29, None, []), ((1, 9, 29), 29, 2 * count, [])]
    # what is given to the model is given to the function
    model(ids, labels=ids, shift_labels=ids, output_attentions=False)
    assert calls[-1][3] == ["output_attentions", "shift_labels"]
    with refuses("contradiction", "labels", "[1, 4]", "[1, 9]"):
        model(ids, labels=tokens(1, 4))


def test_a_loss_function_of_none_is_the_usual_one():
    _, model = both("fla")
    ids = tokens(1, 9)
    wanted = model(ids, labels=ids).loss
    model.loss_function = None
    assert_same(model(ids, labels=ids).loss, wanted)
    model.loss_function = lambda **_: torch.tensor(7.0)
    assert model(ids, labels=ids).loss == 7
    model.loss_function = None
    assert_same(model(ids, labels=ids).loss, wanted)
    with refuses("invalid-value", "loss_function", "'mean'"):
        model.loss_function = "mean"


def test_a_loss_function_may_be_a_module():
    class Seven(torch.nn.Module):
        def forward(self, **_):
            return torch.tensor(7.0)

    _, model = both("fla")
    ids = tokens(1, 9)
    wanted = model(ids, labels=ids).loss
    model.loss_function = Seven()
    assert model(ids, labels=ids).loss == 7
    model.loss_function = None
    assert_same(model(ids, labels=ids).loss, wanted)


@pytest.mark.parametrize("name", KINDS)
def test_packed_sequences(name):
    _, model = both(name)
    lengths = [5, 1, 6]
    bounds = torch.tensor([0, 5, 6, 12])
    ids = tokens(1, 12)
    # what transformers' collator for packed rows hands over
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6}
    out = model(ids, labels=ids, position_ids=places, **given)
    parts = ids.split(lengths, 1)
    assert_same(out.logits, torch.cat([model(part).logits for part in parts], 1))
    assert out[CACHE_NAME] is None if CACHE_NAME in out else True
    losses = [model(part, labels=part, num_items_in_batch=1).loss for part in parts]
    assert_same(out.loss * 9, torch.stack(losses).sum())


@pytest.mark.parametrize(
    ("arguments", "code", "names"),
    [
        ({}, "contradiction", ["input_ids", "inputs_embeds"]),
        ({"input_ids": tokens(1, 3), "inputs_embeds": torch.zeros(1, 3, 16)}, "contradiction", ["inputs_embeds"]),
        (
            {"input_ids": tokens(1, 3), "attention_mask": torch.ones(1, 2)},
            "contradiction",
            ["attention_mask", "[1, 2]", "[1, 3]"],
        ),
        (
            {"input_ids": tokens(1, 3), "attention_mask": torch.ones(1, 1, 3, 3)},
            "invalid-value",
            ["attention_mask", "[1, 1, 3, 3]"],
        ),
        (
            {"input_ids": tokens(1, 3), "attention_mask": {"full_attention": None}},
            "invalid-value",
            ["attention_mask", "dict"],
        ),
        ({"input_ids": tokens(1, 3), "attention_masks": torch.ones(1, 3)}, "unknown-name", ["attention_masks"]),
        ({"input_ids": tokens(1, 3), "output_attentions": True}, "unsupported", ["output_attentions"]),
        (
            {"input_ids": tokens(1, 3), "output_hidden_states": [0, 2]},
            "invalid-value",
            ["output_hidden_states", "[0, 2]"],
        ),
        ({"input_ids": tokens(1, 3), "is_causal": False}, "unsupported", ["is_causal"]),
        (
            {"input_ids": tokens(1, 3), "position_ids": torch.tensor([[0, 1, 0]])},
            "unsupported",
            ["position_ids", "cu_seq_lens_q"],
        ),
        ({"input_ids": tokens(1, 3), "position_ids": torch.tensor([[0, 2, 3]])}, "unsupported", ["position_ids"]),
        ({"input_ids": tokens(1, 3), "position_ids": torch.tensor([0, 1, 2])}, "unsupported", ["position_ids"]),
        (
            {"input_ids": tokens(1, 3), "seq_idx": torch.tensor([[0, 0, 1]])},
            "unsupported",
            ["seq_idx", "cu_seq_lens_q"],
        ),
        ({"input_ids": tokens(2, 3), "cu_seq_lens_q": torch.tensor([0, 3])}, "contradiction", ["cu_seq_lens_q"]),
        (
            {"input_ids": tokens(1, 3), "cu_seq_lens_q": torch.tensor([0, 3]), "use_cache": True},
            "contradiction",
            ["cu_seq_lens_q"],
        ),
        (
            {"input_ids": tokens(1, 3), "cache": DynamicCache(), "past_key_values": DynamicCache()},
            "contradiction",
            ["cache and past_key_values"],
        ),
        ({"input_ids": tokens(1, 3), "labels": tokens(1, 4)}, "contradiction", ["labels", "[1, 4]"]),
    ],
)
def test_what_the_model_cannot_follow_is_refused(arguments, code, names):
    with refuses(code, *names):
        HGRN2ForCausalLM(hf_config("fla"))(**arguments)


@pytest.mark.parametrize("bounds", [[0, 2], [0, 2, 1, 3], [1, 3]])
def test_bounds_that_do_not_fit_are_refused(bounds):
    # the message is the operator's
    with refuses("invalid-value", "cu_seqlens"):
        HGRN2ForCausalLM(hf_config("fla"))(tokens(1, 3), cu_seq_lens_q=torch.tensor(bounds))


@pytest.mark.parametrize("name", ["fla", "bias", "mixer-layernorm", "no-bound", "tied", "window-attention"])
def test_initial_weights_are_drawn_as_ours(name):
    own = HGRN2LM(config_of(name).replace(hidden_size=64, expand_ratio=8, intermediate_size=64, vocab_size=200))
    torch.manual_seed(0)
    model = HGRN2ForCausalLM(HGRN2Config(**own.config.to_dict()))
    mine = own.state_dict()
    for key, parameter in model.state_dict().items():
        if mine[key].std(correction=0) == 0:
            assert torch.equal(parameter, mine[key]), key
        else:
            # five standard errors of the shortest, a convolution of 256 numbers
            assert parameter.std() == pytest.approx(mine[key].std(), rel=0.25), key
            assert abs(parameter.mean()) < 0.3 * parameter.std(), key


@torch.no_grad()
def test_dtypes():
    _, model = both("short-conv", torch.bfloat16)
    out = model(tokens(2, 9), use_cache=True)
    assert out.logits.dtype == torch.bfloat16
    state = out[CACHE_NAME].layers[0].state
    # the state is a sum of many terms
    assert (state["recurrent"].dtype, state["q_conv"].dtype) == (torch.float32, torch.bfloat16)
    _, exact = both("short-conv")
    wanted = exact(tokens(2, 9)).logits
    assert (out.logits.double() - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_classifier_reads_the_last_token(name):
    torch.manual_seed(0)
    model = HGRN2ForSequenceClassification(hf_config(name, num_labels=3)).double().eval()
    lengths = [9, 4, 1]
    ids, mask = left_padded(lengths)
    wanted = [model.score(model.model(ids[i : i + 1, -n:]).last_hidden_state[:, -1]) for i, n in enumerate(lengths)]
    wanted = torch.cat(wanted)
    assert_same(model(ids, attention_mask=mask).logits, wanted)
    right = torch.stack([row.roll(n) for row, n in zip(ids, lengths, strict=True)])
    right_mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    assert_same(model(right, attention_mask=right_mask).logits, wanted)
    with refuses("incomplete", "attention_mask", "pad_token_id"):
        model(ids)
    with refuses("incomplete", "attention_mask"):
        model(inputs_embeds=model.model.embeddings(ids))
    # padding known by its token alone: what follows the last other token is not looked at
    model.config.pad_token_id = 28
    filled = torch.where(right_mask.bool(), right.clamp_max(27), 28)
    found = model(filled).logits
    assert_same(found, model(filled, attention_mask=right_mask).logits)


@pytest.mark.parametrize(
    ("keys", "count"), [({}, 2), ({"num_labels": 1}, 1), ({"id2label": {0: "a", 1: "b", 2: "c"}}, 3)]
)
def test_classifier_s_classes(keys, count):
    model = HGRN2ForSequenceClassification(hf_config("fla", **keys)).double()
    ids, mask = left_padded([5, 3])
    targets = torch.tensor([1.0, 0.5], dtype=torch.float64) if count == 1 else torch.tensor([1, 0])
    out = model(ids, attention_mask=mask, labels=targets)
    assert out.logits.shape == (2, count)
    # of one class: a number
    loss = (
        functional.mse_loss(out.logits[:, 0], targets) if count == 1 else functional.cross_entropy(out.logits, targets)
    )
    assert_same(out.loss, loss)


@pytest.mark.parametrize("keys", [{"num_labels": 0}, {"id2label": {}}])
def test_a_classifier_without_classes(keys):
    with refuses("invalid-value", "num_labels", "0"):
        HGRN2ForSequenceClassification(hf_config("fla", **keys))


@pytest.mark.parametrize(
    ("labels", "loss"),
    [
        (torch.tensor([0, 2]), lambda logits, y: functional.cross_entropy(logits, y)),
        (
            torch.tensor([[1.0, 0, 1], [0, 0, 1]]),
            lambda logits, y: functional.binary_cross_entropy_with_logits(logits, y.double()),
        ),
    ],
)
def test_classifier_loss(labels, loss):
    model = HGRN2ForSequenceClassification(hf_config("fla", num_labels=3)).double()
    ids, mask = left_padded([5, 3])
    out = model(ids, attention_mask=mask, labels=labels if labels.dim() == 1 else labels.double())
    assert_same(out.loss, loss(out.logits, labels))
    out.loss.backward()
    assert model.model.embeddings.weight.grad.abs().sum() > 0
