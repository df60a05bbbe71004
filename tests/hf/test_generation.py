"""`generate` in all its ways, against a plain loop over our model."""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

import copy

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.exporters.utils import decompose_for_generation

from hgrn2.hf.cache import CACHE_NAME
from tests.hf.cases import KINDS, both, continued, left_padded, tokens
from tests.refusals import refuses

GREEDY = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy(name, use_cache):
    own, model = both(name)
    for length in (1, 9):
        ids = tokens(2, length)
        found = model.generate(ids, use_cache=use_cache, **GREEDY)
        assert torch.equal(found.sequences, continued(own, ids, 6))
        cache = found.get(CACHE_NAME)
        assert (cache is not None) == use_cache
        # the last token is not read yet
        assert cache is None or cache.get_seq_length() == length + 5


@pytest.mark.parametrize("name", KINDS)
def test_left_padded_texts_are_as_if_alone(name):
    own, model = both(name)
    lengths = [8, 3, 1]
    ids, mask = left_padded(lengths)
    found = model.generate(ids, attention_mask=mask, **GREEDY).sequences
    for i, n in enumerate(lengths):
        assert torch.equal(found[i : i + 1, -n - 6 :], continued(own, ids[i : i + 1, -n:], 6))


@pytest.mark.parametrize("name", KINDS)
def test_going_on_from_a_returned_cache(name):
    own, model = both(name)
    ids = tokens(2, 5)
    first = model.generate(ids, **GREEDY)
    cache = first[CACHE_NAME]
    wanted = continued(own, torch.cat([first.sequences, tokens(2, 3, seed=7)], 1), 6)
    # the whole text again: what the cache has read is passed over
    again = model.generate(wanted[:, :14], **{CACHE_NAME: copy.deepcopy(cache)}, **GREEDY)
    assert torch.equal(again.sequences, wanted)
    # only what is new, with a mask for the whole text
    new = wanted[:, 10:14]
    again = model.generate(new, attention_mask=torch.ones(2, 14), **{CACHE_NAME: cache}, **GREEDY)
    assert torch.equal(again.sequences[:, 4:], wanted[:, 14:])


@pytest.mark.parametrize("name", KINDS)
def test_static_caches(name):
    own, model = both(name)
    lengths = [8, 3, 1]
    ids, mask = left_padded(lengths)
    found = model.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY)
    for i, n in enumerate(lengths):
        assert torch.equal(found.sequences[i : i + 1, -n - 6 :], continued(own, ids[i : i + 1, -n:], 6))
    sizes = {layer.state["key"].shape[1] for layer in found[CACHE_NAME].layers if "key" in layer.state}
    assert sizes <= ({5} if name == "window-attention" else {13, 14})
    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6}
    wanted = model.generate(ids, attention_mask=mask, **beams)
    assert torch.equal(model.generate(ids, attention_mask=mask, cache_implementation="static", **beams), wanted)


@pytest.mark.parametrize("name", KINDS)
def test_going_on_with_padded_texts(name):
    own, model = both(name)
    lengths = [6, 2]
    ids, mask = left_padded(lengths)
    first = model.generate(ids, attention_mask=mask, **GREEDY)
    more = torch.cat([first.sequences, tokens(2, 2, seed=5)], 1)
    mask = torch.cat([mask, torch.ones(2, 8)], 1)
    found = model.generate(more, attention_mask=mask, **{CACHE_NAME: first[CACHE_NAME]}, **GREEDY).sequences
    for i, n in enumerate(lengths):
        assert torch.equal(found[i : i + 1, 6 - n :], continued(own, more[i : i + 1, 6 - n :], 6))


@pytest.mark.parametrize("name", KINDS)
def test_prompts_in_pieces(name):
    own, model = both(name)
    ids = tokens(2, 11)
    found = model.generate(ids, prefill_chunk_size=4, **GREEDY).sequences
    assert torch.equal(found, continued(own, ids, 6))


@torch.no_grad()
def best_by_beams(own, ids, beams, count):
    """Beam search by its definition, all of the text read again for each token; no end of text."""
    texts, scores = ids, torch.zeros(1, dtype=torch.float64)
    for _ in range(count):
        logits = own(texts)[0][:, -1].log_softmax(-1)
        total = scores[:, None] + logits
        scores, order = total.flatten().topk(beams)
        texts = torch.cat([texts[order // logits.shape[1]], (order % logits.shape[1])[:, None]], 1)
    return texts, scores


@pytest.mark.parametrize("name", KINDS)
def test_beam_search(name):
    own, model = both(name)
    ids = tokens(2, 5)
    found = model.generate(ids, num_beams=4, num_return_sequences=3, length_penalty=0.0, output_scores=True, **GREEDY)
    for i in range(2):
        texts, scores = best_by_beams(own, ids[i : i + 1], 4, 6)
        assert torch.equal(found.sequences[3 * i : 3 * i + 3], texts[:3])
        # the library adds scores up in float32
        torch.testing.assert_close(found.sequences_scores[3 * i : 3 * i + 3].double(), scores[:3], rtol=1e-5, atol=1e-5)
    uncached = model.generate(ids, num_beams=4, num_return_sequences=3, length_penalty=0.0, use_cache=False, **GREEDY)
    assert torch.equal(uncached.sequences, found.sequences)
    one = model.generate(ids, num_beams=1, **GREEDY).sequences
    assert torch.equal(one, continued(own, ids, 6))


@pytest.mark.parametrize("name", KINDS)
def test_beams_that_are_drawn_are_the_same_without_a_cache(name):
    _, model = both(name)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(4)
        found.append(model.generate(tokens(2, 5), num_beams=3, do_sample=True, max_new_tokens=6, use_cache=use_cache))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", KINDS)
def test_sampling(name):
    own, model = both(name)
    ids = tokens(1, 5)
    torch.manual_seed(3)
    found = model.generate(ids, do_sample=True, top_k=0, num_return_sequences=3, max_new_tokens=5)
    torch.manual_seed(3)
    wanted = ids.expand(3, -1)
    for _ in range(5):
        with torch.no_grad():
            p = own(wanted)[0][:, -1].float().softmax(-1)
        wanted = torch.cat([wanted, torch.multinomial(p, 1)], 1)
    assert torch.equal(found, wanted)
    assert len({tuple(row) for row in found.tolist()}) == 3


def test_scores_logits_and_the_end_of_a_text():
    own, model = both("fla")
    ids = tokens(1, 5)
    wanted = continued(own, ids, 6)
    end = int(wanted[0, 7])
    found = model.generate(ids, eos_token_id=end, output_logits=True, output_hidden_states=True, **GREEDY)
    stop = wanted[0, 5:].tolist().index(end) + 6
    assert torch.equal(found.sequences, wanted[:, :stop])
    with torch.no_grad():
        logits = own(wanted)[0][:, 4 : stop - 1].float()
    torch.testing.assert_close(torch.stack(found.logits, 1), logits, rtol=1e-5, atol=1e-5)
    assert [len(layers) for layers in found.hidden_states] == [4] * (stop - 5)


@pytest.mark.parametrize("name", ["fla", "full-attention"])
def test_embeddings_as_a_prompt(name):
    own, model = both(name)
    ids = tokens(2, 5)
    found = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY)
    assert torch.equal(found.sequences, continued(own, ids, 6)[:, 5:])


def test_embeddings_are_not_read_in_pieces():
    _, model = both("fla")
    with refuses("contradiction", "inputs_embeds"):
        model.generate(inputs_embeds=model.get_input_embeddings()(tokens(2, 5)), prefill_chunk_size=2, **GREEDY)


def test_without_a_prompt_a_text_begins_with_its_token():
    own, model = both("fla")
    found = model.generate(bos_token_id=7, **GREEDY).sequences
    assert torch.equal(found, continued(own, torch.tensor([[7]]), 6))


@pytest.mark.parametrize("name", KINDS)
def test_taking_tokens_back_is_refused(name):
    _, model = both(name)
    _, assistant = both("fla")
    ids = tokens(1, 5)
    # the message is the library's, and so may its sort be
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids, assistant_model=assistant, **GREEDY)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids, prompt_lookup_num_tokens=2, **GREEDY)
    with refuses("unsupported", "output_attentions"):
        model.generate(ids, output_attentions=True, **GREEDY)
    cache = model(ids, use_cache=True)[CACHE_NAME]
    cache.offloading = True
    with refuses("unsupported", "DynamicCache"):
        model.generate(ids, **{CACHE_NAME: cache}, **GREEDY)


def test_being_an_assistant_is_refused():
    # it would have to forget what the other model did not take
    _, assistant = both("fla", torch.float32)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    with refuses("unsupported", "cache"):
        LlamaForCausalLM(config).generate(tokens(1, 5), assistant_model=assistant, **GREEDY)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_the_library_s_decomposition_for_export_decodes_several_tokens_of_padded_prompts(name, static):
    own, model = both(name)
    ids, mask = left_padded([6, 2])
    settings = GenerationConfig(pad_token_id=0)
    if static:
        settings.cache_implementation, settings.max_cache_len = "static", 20
    inputs = {"input_ids": ids, "attention_mask": mask}
    parts = decompose_for_generation(model, inputs, generation_config=settings, multi_token_decode=True)
    decode, inputs = parts["decode"]
    whole = torch.cat([ids, inputs["input_ids"]], 1)
    wanted = own(whole, attention_mask=torch.cat([mask, torch.ones(2, 2)], 1))[0][:, -2:]
    torch.testing.assert_close(decode(**inputs).logits, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "masked"), [*zip(KINDS, [False, True, True, True, False, True], strict=True)])
@torch.no_grad()
def test_a_step_is_one_graph_of_one_shape(name, masked):
    torch._dynamo.reset()
    own, model = both(name)
    ids = tokens(2, 12)
    cache = StaticCache(config=model.config, max_cache_len=15)
    model(ids[:, :5], **{CACHE_NAME: cache})
    places = [x.data_ptr() for layer in cache.layers for x in layer.state.values()]
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(model.forward, backend=count, fullgraph=True, dynamic=False)
    mask = torch.ones(2, 1) if masked else None
    logits = [step(ids[:, t : t + 1], attention_mask=mask, **{CACHE_NAME: cache}).logits for t in range(5, 12)]
    torch.testing.assert_close(torch.cat(logits, 1), own(ids)[0][:, 5:], rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1
    # where a CUDA graph would look for it
    assert [x.data_ptr() for layer in cache.layers for x in layer.state.values()] == places
    assert cache.get_seq_length() == 12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fla", "window-attention"])
def test_generate_compiles_its_step_once(name):
    torch._dynamo.reset()
    own, model = both(name)
    ids = tokens(2, 4)
    config = CompileConfig(backend="aot_eager", fullgraph=True, dynamic=False, mode=None)
    config._compile_all_devices = True
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = model.generate(ids, cache_implementation="static", compile_config=config, **GREEDY).sequences
    assert torch.equal(found, continued(own, ids, 6))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.parametrize("name", KINDS)
def test_a_mask_of_another_width_is_refused_before_anything_is_read(name):
    own, model = both(name)
    ids = tokens(2, 10)
    with torch.no_grad():
        cache = model(ids[:, :7], use_cache=True)[CACHE_NAME]
        for width in (5, 9, 11, 20):
            with refuses("contradiction", "attention_mask"):
                model(ids[:, 7:], attention_mask=torch.ones(2, width), **{CACHE_NAME: cache})
        with refuses("contradiction", "attention_mask"):
            model(ids, attention_mask=torch.ones(2, 12))
        logits = model(ids[:, 7:], attention_mask=torch.ones(2, 10), **{CACHE_NAME: cache}).logits
        torch.testing.assert_close(logits, own(ids)[0][:, 7:])


@pytest.mark.parametrize("name", ["full-attention", "window-attention"])
def test_prompts_in_pieces_with_a_static_cache(name):
    own, model = both(name)
    ids = tokens(1, 7)
    settings = {"cache_implementation": "static", "prefill_chunk_size": 2, "disable_compile": True}
    assert torch.equal(model.generate(ids, **settings, **GREEDY).sequences, continued(own, ids, 6))


def test_a_refused_call_leaves_the_cache_alone():
    own, model = both("full-attention")
    ids = tokens(1, 8)
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        model(ids[:, :6], **{CACHE_NAME: cache})
        with refuses("invalid-value", "cache", "8", "10"):
            model(tokens(1, 4), **{CACHE_NAME: cache})
        logits = model(ids[:, 6:], **{CACHE_NAME: cache}).logits
        torch.testing.assert_close(logits, own(ids)[0][:, 6:])


def test_dropout_falls_on_the_same_places():
    own, model = both("fla", dtype=torch.float32)
    for one in (own, model):
        one.train()
        blocks = one.model.layers
        for block in blocks:
            block.dropout = 0.3
    own.model.config = own.model.config.replace(dropout=0.3)
    model.model.config.dropout = 0.3
    ids = tokens(2, 9)
    outputs = []
    for call in (lambda: own(ids)[0], lambda: model(ids).logits):
        torch.manual_seed(0)
        outputs.append(call())
    torch.testing.assert_close(*outputs)
    own.eval()
    assert not torch.allclose(own(ids)[0], outputs[0])
